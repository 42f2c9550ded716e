"""Which of two experts is called at which t (Wan 2.2 A14B). No torch is imported here.

``transformer`` is for high noise, ``t >= boundary``, and ``transformer_2`` for low noise below it,
with the boundary in units of t after any shift, which is the time that the call itself gets.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

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


def module_ranges(boundary: float | None) -> Mapping[str, tuple[float, float]]:
    """Return each module's own [low, high); empty for a single transformer."""
    if boundary is None:
        return {}
    low, high = ranges([boundary])
    return {HIGH: high, LOW: low}


def expert_of(t: Tensor, boundary: float | None, role: str) -> str:
    """Choose the module for a call at ``t`` [B].

    The comparison is WanPipeline's: in the type of t, equality to the high noise one.

    Raises:
        ContractError: ``t`` lies on both sides. The call is not cut in two: in a run of several
            processes each must call the same modules, and the gradient of one accumulation round
            must be one expert's.
    """
    if boundary is None:
        return HIGH
    times = t.detach().cpu()
    high = times >= boundary
    if bool(high.all()):
        return HIGH
    if not bool(high.any()):
        return LOW
    raise ContractError(
        f"role {role!r} was called with t from {float(times.min()):g} to "
        f"{float(times.max()):g}, on both sides of {boundary:g}, where its experts change; one "
        "call goes to one expert. Draw the times of a batch within one of adapter.expert_ranges"
    )
