"""How to sample, as one value: rollout, validation, sampling and export read the same one.

No torch here: run files are checked and plans printed without it.
"""

from __future__ import annotations

import itertools
from typing import TypeVar

from attrs import field, frozen

from distill_protocols.validators import above, at_least

Number = TypeVar("Number")


def shift_sigma(u: Number, shift: float) -> Number:
    """``S_k(u) = k u / (1 + (k - 1) u)`` (SD3, Esser et al. 2024, eq. 23), floats or tensors.

    Monotone in u, fixes 0 and 1; shifting by a after shifting by b is shifting by a * b.
    """
    return shift * u / (1 + (shift - 1) * u)  # type: ignore[operator]


@frozen(kw_only=True)
class SamplerSpec:
    """One way to walk from noise to a clip.

    Attributes:
        steps: model calls (before guidance doubles them).
        shift: flow shift k applied to the uniform grid u = 1, 1 - 1/steps, ...
        guidance: w in ``u + w (c - u)``; 1 is conditional, 0 unconditional. (CausVid,
            Self-Forcing and FastVideo's old code write ``c + s (c - u)``, which is w = s + 1.)
        guidance_2: w of the expert for the low noise levels, where a model has two; left out, the
            same as ``guidance``, which is then the other's alone.
        stochastic: True re-noises the predicted x0 with fresh noise at each step (the few-step
            sampler of DMD2 and consistency models); False follows the flow ODE (Euler).
        timesteps: t in (0, 1000], descending, instead of ``shift`` and the grid. Already
            shifted: they are used as they stand.
        context_noise: t in [0, 1000) at which a finished chunk of a causal role becomes past, and
            the noise that it gets for it (Self-Forcing, Huang et al. 2025). 0 is no noise at all
            and t = 0. A role that is not causal has no past, and never reads it.
    """

    steps: int = field(validator=at_least(1, "a clip takes at least one model call"))
    shift: float = field(
        default=1.0,
        validator=above(0, "S_k(u) = k u / (1 + (k - 1) u) is a noise level for positive k only"),
    )
    guidance: float = field(
        default=1.0,
        validator=at_least(0, "u + w (c - u) with w < 0 leads away from the prompt; 1 is plain"),
    )
    guidance_2: float | None = field(default=None)
    stochastic: bool = False
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

    def sigmas(self) -> tuple[float, ...]:
        """Noise level of each model call, descending in (0, 1]; the end (0) is not included."""
        if self.timesteps is not None:
            return tuple(t / 1000 for t in self.timesteps)
        return tuple(float(shift_sigma(1 - i / self.steps, self.shift)) for i in range(self.steps))

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
    """One thing to look at: a role, its weights (live or EMA), and how it is sampled.

    ``sampler=None`` means the method's own spec for its student.
    """

    name: str
    role: str
    sampler: SamplerSpec | None = None
    ema: bool = False
