"""Which of two experts is called at which t (Wan 2.2 A14B). No torch is imported here.

``transformer`` is for high noise, ``t >= boundary``, and ``transformer_2`` for low noise below it,
with the boundary in units of t after any shift, which is the time that the call itself gets.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from attrs import frozen
from distill_diffusers.kinds import TRAIN_STEPS
from distill_diffusers.model_configs import read_number
from distill_protocols import ContractError

if TYPE_CHECKING:
    from torch import Tensor

HIGH, LOW = "transformer", "transformer_2"


def stated_ratio(call_options: Mapping[str, object]) -> float | None:
    """Read the ``boundary_ratio`` of a model's index; None where it has none.

    Raises:
        WeightsError: it is no number.
    """
    if call_options.get("boundary_ratio") is None:
        return None
    return read_number(call_options, "boundary_ratio")


def boundary_of(
    modules: Collection[str], own: float | None, override: float | None
) -> float | None:
    """Return the t at and above which HIGH is called; None for a single transformer.

    Args:
        modules: of the model, whichever of them a role has.
        own: ``boundary_ratio`` of the model's index (``stated_ratio``).
        override: that of the run.
    """
    ratio = own if override is None else override
    if LOW not in modules or ratio is None:
        return None
    # Rounded to fp32, the type of t: a comparison in fp64 elsewhere then has the same outcome.
    return struct.unpack("f", struct.pack("f", ratio * TRAIN_STEPS))[0]


def ranges(boundaries: Iterable[float]) -> tuple[tuple[float, float], ...]:
    """Return rising [low, high) that fill [0, 1000] and have an end at each boundary."""
    ends = sorted({0.0, *boundaries, TRAIN_STEPS})
    return tuple(itertools.pairwise(ends))


def module_ranges(
    boundary: float | None, modules: Collection[str] = (HIGH, LOW)
) -> Mapping[str, tuple[float, float]]:
    """Return the [low, high) of each of ``modules``; empty for a single transformer."""
    if boundary is None:
        return {}
    low, high = ranges([boundary])
    return {name: own for name, own in ((HIGH, high), (LOW, low)) if name in modules}


@frozen(kw_only=True)
class Experts:
    """Which module of a role is called at which t.

    Attributes:
        role: its name.
        modules: that it has.
        boundary: t at and above which its model calls HIGH; None: the model has one transformer.
    """

    role: str
    modules: Collection[str]
    boundary: float | None

    def ranges(self) -> Mapping[str, tuple[float, float]]:
        """Return the [low, high) of each module that there is."""
        return module_ranges(self.boundary, self.modules) or {HIGH: (0.0, TRAIN_STEPS)}

    def module_at(self, t: Tensor) -> str:
        """Choose the module for a call at ``t`` [B].

        The comparison is WanPipeline's: in the type of t, equality to the high noise one.

        Raises:
            ContractError: ``t`` lies on both sides. The call is not cut in two: in a run of
                several processes each must call the same modules, and the gradient of one
                accumulation round must be one expert's. Or the role does not have this expert.
        """
        if self.boundary is None:
            return HIGH
        times = t.detach().cpu()
        high = times >= self.boundary
        if bool(high.any()) != bool(high.all()):
            raise ContractError(
                f"role {self.role!r} was called with t from {float(times.min()):g} to "
                f"{float(times.max()):g}, on both sides of {self.boundary:g}, where its experts "
                "change; one call goes to one expert. Draw the times of a batch within one of "
                "adapter.expert_ranges"
            )
        module = HIGH if bool(high.all()) else LOW
        if module in self.modules:
            return module
        ((low, end),) = self.ranges().values()
        raise ContractError(
            f"role {self.role!r} was called at t = {float(times.flatten()[0]):g}, which is for its "
            f"model's {module}, and it has {', '.join(self.modules)} alone, for t from {low:g} to "
            f"{end:g}. Call it there, or load both experts"
        )
