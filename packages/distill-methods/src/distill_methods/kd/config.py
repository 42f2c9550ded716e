"""Options of KD. No torch here: run files are checked without it."""

from __future__ import annotations

from typing import Literal

from attrs import field, frozen
from attrs.validators import in_
from distill_protocols import RoleNeed, SamplerSpec

from distill_methods.latent_config import LatentMethodConfig
from distill_methods.roles import STUDENT
from distill_methods.time_ranges import share_of_levels


def _unguided(_config: object, _: object, value: SamplerSpec) -> None:
    if value.guided:
        w = next(w for w in value.guidances if w != 1)
        raise ValueError(
            f"guidance {w:g} must be 1: the trajectories hold the teacher's guidance, so a student "
            "that is guided once more is another model than the one trained. Set it where the "
            "trajectories are made"
        )


@frozen(kw_only=True)
class KDConfig(LatentMethodConfig):
    """ODE regression (CausVid, Yin et al. 2025, section 4.3).

    Attributes:
        student_sampler: how the student is sampled in validation and export. Its levels are those
            that it learns at, and the trajectories must hold them.
        past: what a chunk of a causal student sees before it in training. mixed: chunks at levels
            of their own, drawn among the student's and t = 0, at which a chunk is clean and has no
            loss (CausVid). noisy: the same without t = 0. clean: the clean clip (teacher forcing).
            A student that is not causal has one chunk and no past: mixed and noisy are then alike.
    """

    student_sampler: SamplerSpec = field(
        default=SamplerSpec(steps=4, shift=8.0, stochastic=True), validator=_unguided
    )
    past: Literal["mixed", "noisy", "clean"] = field(
        default="mixed", validator=in_(("mixed", "noisy", "clean"))
    )

    @property
    def roles(self) -> tuple[RoleNeed, ...]:
        """Roles that are called: the teacher did its part before."""
        return (STUDENT,)

    def turns(self, iteration: int) -> tuple[str, ...]:
        """Roles that learn in ``iteration`` (1-based): always the student."""
        return ("student",)

    @property
    def trajectory_times(self) -> tuple[float, ...]:
        """Levels t that the student learns at, falling."""
        return tuple(1000 * sigma for sigma in self.student_sampler.sigmas())

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What the adapter must be able to do."""
        forced = ("supports_teacher_forcing", "causal:student") if self.past == "clean" else ()
        return ("pred:x0", *forced)

    def update_share(self, role: str, low: float, high: float) -> float:
        """See ``MethodConfig.update_share``."""
        return share_of_levels(self.trajectory_times, low, high)
