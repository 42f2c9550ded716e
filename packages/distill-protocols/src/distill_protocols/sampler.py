"""How to sample, as one value: rollout, validation, sampling and export read the same one.

No torch here: run files are checked and plans printed without it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Literal, TypeVar, get_args

from attrs import evolve, field, frozen
from attrs.validators import in_

from distill_protocols.errors import ContractError
from distill_protocols.validators import above, at_least, within

Number = TypeVar("Number")

Solver = Literal["euler", "unipc"]
"""How the flow ODE is followed: Euler's method, or UniPC of second order (Zhao et al. 2023, arXiv
2302.04867), which Wan's pipelines ship with."""

UNIPC_FIRST_SIGMA = 1 - 1e-6
"""UniPC starts here instead of at 1, where its log-SNR is infinite (diffusers 0.42
``UniPCMultistepScheduler.set_timesteps``)."""


def shift_sigma(u: Number, shift: float) -> Number:
    """``S_k(u) = k u / (1 + (k - 1) u)`` (SD3, Esser et al. 2024, eq. 23), floats or tensors.

    Monotone in u, fixes 0 and 1; shifting by a after shifting by b is shifting by a * b.
    """
    return shift * u / (1 + (shift - 1) * u)  # type: ignore[operator]


_TOKENS = "it counts tokens"


def _more_tokens(rule: DynamicShift, _: object, value: int) -> None:
    if not value > rule.base_tokens:
        raise ValueError(
            f"{value} must be above base_tokens ({rule.base_tokens}): mu is a straight line "
            "between the two"
        )


@frozen(kw_only=True)
class DynamicShift:
    """A flow shift that depends on how many tokens a clip makes (Flux, LTX-Video, Qwen-Image).

    ``s' = e^mu / (e^mu + 1 / s - 1)``, which is ``S_k`` with ``k = e^mu``; mu is a straight line
    through (base_tokens, base_mu) and (max_tokens, max_mu), also beyond them. Afterwards ``1 - s'``
    is scaled so that the last noise level is ``terminal`` (diffusers 0.42
    ``FlowMatchEulerDiscreteScheduler.time_shift`` and ``stretch_shift_to_terminal``,
    ``pipelines/ltx/pipeline_ltx.py calculate_shift``).

    Attributes:
        base_tokens, base_mu: one point of the line.
        max_tokens, max_mu: the other.
        terminal: noise level of the last step; left out: whatever the shift makes of it.
    """

    base_tokens: int = field(default=256, validator=at_least(1, _TOKENS))
    max_tokens: int = field(default=4096, validator=[at_least(1, _TOKENS), _more_tokens])
    base_mu: float = 0.5
    max_mu: float = 1.15
    terminal: float | None = field(default=None)

    @terminal.validator
    def _check_terminal(self, attribute: object, value: float | None) -> None:
        if value is not None:
            within(0, 1, "it is a noise level")(self, attribute, value)

    def mu(self, tokens: int) -> float:
        """log of the shift for a clip of ``tokens``."""
        slope = (self.max_mu - self.base_mu) / (self.max_tokens - self.base_tokens)
        return self.base_mu + slope * (tokens - self.base_tokens)

    def sigmas(self, steps: int, tokens: int) -> tuple[float, ...]:
        """Noise level of each of ``steps`` calls, descending in (0, 1]."""
        shift = math.exp(self.mu(tokens))
        sigmas = [float(shift_sigma(1 - i / steps, shift)) for i in range(steps)]
        if self.terminal is None or steps == 1:  # a single step starts at pure noise
            return tuple(sigmas)
        scale = (1 - sigmas[-1]) / (1 - self.terminal)
        return tuple(1 - (1 - sigma) / scale for sigma in sigmas)


def _positive_or_rule(spec: object, attribute: object, value: float | DynamicShift) -> None:
    if not isinstance(value, DynamicShift):
        reason = "S_k(u) = k u / (1 + (k - 1) u) is a noise level for positive k only"
        above(0, reason)(spec, attribute, value)


@frozen(kw_only=True)
class SamplerSpec:
    """One way to walk from noise to a clip.

    Attributes:
        steps: model calls (before guidance doubles them).
        shift: flow shift k applied to the uniform grid u = 1, 1 - 1/steps, ...; or a rule that
            takes it from the number of tokens (see ``resolved``).
        guidance: w in ``u + w (c - u)``; 1 is conditional, 0 unconditional. (CausVid,
            Self-Forcing and FastVideo's old code write ``c + s (c - u)``, which is w = s + 1.)
        guidance_2: w of the expert for the low noise levels, where a model has two; left out, the
            same as ``guidance``, which is then the other's alone.
        stochastic: True re-noises the predicted x0 with fresh noise at each step (the few-step
            sampler of DMD2 and consistency models); False follows the flow ODE.
        solver: how the ODE is followed. ``unipc`` is diffusers' ``UniPCMultistepScheduler`` as
            Wan's pipelines configure it, with ``shift`` as its ``flow_shift``: its grid is u = 1,
            1 - .999/steps, ..., and it calls the model at t rounded down to a whole number. It
            keeps what earlier calls gave, so it walks a whole clip (or chunk) and cannot be left
            early: not for ``stochastic``, nor for rollouts in training.
        timesteps: t in (0, 1000], descending, instead of ``shift`` and the grid. Already
            shifted: they are used as they stand.
        context_noise: t in [0, 1000) at which a finished chunk of a causal role becomes past, and
            the noise that it gets for it (Self-Forcing, Huang et al. 2025). 0 is no noise at all
            and t = 0. A role that is not causal has no past, and never reads it.
    """

    steps: int = field(validator=at_least(1, "a clip takes at least one model call"))
    shift: float | DynamicShift = field(default=1.0, validator=_positive_or_rule)
    guidance: float = field(
        default=1.0,
        validator=at_least(0, "u + w (c - u) with w < 0 leads away from the prompt; 1 is plain"),
    )
    guidance_2: float | None = field(default=None)
    stochastic: bool = False
    solver: Solver = field(default="euler", validator=in_(get_args(Solver)))
    timesteps: tuple[float, ...] | None = field(default=None)
    context_noise: float = field(default=0.0)

    @shift.validator
    def _check_shift_used(self, attribute: object, value: float) -> None:
        if self.timesteps is not None and value != 1.0:
            raise ValueError(
                f"{value} has no effect beside timesteps, which are used as they stand. Leave one "
                "of the two out"
            )

    @guidance_2.validator
    def _check_guidance_2(self, attribute: object, value: float | None) -> None:
        if value is not None:
            at_least(0, "u + w (c - u) with w < 0 leads away from the prompt; 1 is plain")(
                self, attribute, value
            )

    @solver.validator
    def _check_solver(self, attribute: object, value: Solver) -> None:
        if value == "euler":
            return
        if self.stochastic:
            raise ValueError(
                f"{value} follows the ODE, and a stochastic sampler leaves it at each step for "
                "fresh noise. Use euler, or stochastic: false"
            )
        second = self._second_sigma()
        if second is not None and not second < UNIPC_FIRST_SIGMA:
            raise ValueError(
                f"{value} starts at t = {1000 * UNIPC_FIRST_SIGMA:g} instead of 1000, and the "
                f"second time, {1000 * second:.8g}, must be below. Use euler, fewer steps or a "
                "smaller shift"
            )

    @context_noise.validator
    def _check_context_noise(self, attribute: object, value: float) -> None:
        if not 0 <= value < 1000:  # nan is not
            raise ValueError(
                f"{value} must be a time in [0, 1000), 0 for none: at 1000 nothing of the past "
                "would be left"
            )

    @timesteps.validator
    def _check_timesteps(self, attribute: object, value: tuple[float, ...] | None) -> None:
        if value is None:
            return
        if not value or len(value) != self.steps:
            raise ValueError(
                f"{len(value)} timesteps for {self.steps} steps; there must be one a step. Leave "
                "timesteps out to have them from shift"
            )
        falls = all(a > b for a, b in itertools.pairwise(value))
        if not falls or not value[0] <= 1000 or not value[-1] > 0:  # nan is neither
            raise ValueError(
                f"{list(value)} must fall strictly within (0, 1000], because each step removes "
                "noise (t = 1000 is pure noise)"
            )

    def resolved(self, tokens: int) -> SamplerSpec:
        """Return the same for clips of ``tokens`` tokens, with the timesteps that a
        ``DynamicShift`` gives them; unchanged where the shift is a number."""
        if not isinstance(self.shift, DynamicShift):
            return self
        times = tuple(1000 * sigma for sigma in self.shift.sigmas(self.steps, tokens))
        return evolve(self, shift=1.0, timesteps=times)

    def sigmas(self) -> tuple[float, ...]:
        """Noise level of each model call, descending in (0, 1]; the end (0) is not included.

        Raises:
            ContractError: the shift depends on the number of tokens, which is not known here.
        """
        if self.timesteps is not None:
            return tuple(t / 1000 for t in self.timesteps)
        if isinstance(self.shift, DynamicShift):
            raise ContractError(
                "the sampler's shift depends on the number of tokens of a clip, so its noise "
                "levels are not known yet. Use SamplerSpec.resolved(tokens)"
            )
        return tuple(float(shift_sigma(u, self.shift)) for u in self._grid())

    def _second_sigma(self) -> float | None:
        """Return the noise level of the second call, if there is one and it is known."""
        if self.timesteps is not None:
            return self.timesteps[1] / 1000 if len(self.timesteps) > 1 else None
        if self.steps < 2 or isinstance(self.shift, DynamicShift) or not self.shift > 0:
            return None  # ``resolved`` comes back with the times of a dynamic shift
        return self.sigmas()[1]

    def _grid(self) -> Iterator[float]:
        """Yield u of each call, as the solver's scheduler in diffusers spaces them."""
        if self.solver == "euler":
            yield from (1 - i / self.steps for i in range(self.steps))
        else:  # the order of operations of numpy.linspace(1, 1 / 1000, steps + 1)
            step = (1 / 1000 - 1) / self.steps
            yield from (i * step + 1 for i in range(self.steps))

    @property
    def guidances(self) -> tuple[float, float]:
        """w of the calls at high and at low noise levels; alike for a model without experts."""
        return self.guidance, self.guidance if self.guidance_2 is None else self.guidance_2

    @property
    def guided(self) -> bool:
        """Whether some call needs a negative condition."""
        return any(w != 1 for w in self.guidances)

    @property
    def calls_per_clip(self) -> int:
        """Model forwards a clip, counting the unconditional ones that guidance adds.

        An upper bound where one of two experts is guided and the other is not: how many calls
        each has is the model's affair.
        """
        return self.steps * (2 if any(w not in (0.0, 1.0) for w in self.guidances) else 1)


@frozen(kw_only=True)
class SampleView:
    """One view of a validation: a role, its weights (live or EMA), and how it is sampled.

    ``sampler=None`` means the method's own spec for its student. ``latent_frames=None`` means clips
    of the run's length; another length is for causal roles, which make a video chunk by chunk.
    """

    name: str
    role: str
    sampler: SamplerSpec | None = None
    ema: bool = False
    latent_frames: int | None = None
