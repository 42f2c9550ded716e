"""Options of KD. No torch here: run files are checked without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from attrs import field, frozen
from attrs.validators import in_
from distill_protocols import ONE_TENSOR, HealthKind, RoleNeed, SamplerSpec

from distill_methods.latent_config import LatentMethodConfig, can_be_left_early
from distill_methods.roles import STUDENT
from distill_methods.time_sampling import fraction_within


def _is_unguided(_config: object, _attribute: object, value: SamplerSpec) -> None:
    if value.guided:
        w = next(w for w in value.guidances if w != 1)
        raise ValueError(
            f"guidance {w:g} must be 1: the trajectories hold the teacher's guidance, so a student "
            "that is guided once more is another model than the one trained. State the guidance "
            "where the trajectories are made"
        )


@frozen(kw_only=True)
class KDConfig(LatentMethodConfig):
    """ODE regression (CausVid, Yin et al. 2025, section 4.3).

    Attributes:
        student_sampler: how the student is sampled in validation and export. It is trained at the
            levels of this sampler, and the trajectories must hold them.
        past: what a chunk of a causal student sees before it in training. mixed: each chunk is at a
            level of its own, drawn among the student's and t = 0, at which a chunk is clean and has
            no loss (CausVid). noisy: the same without t = 0. clean: the clean clip (teacher
            forcing). A student that is not causal has one chunk and no past: mixed and noisy are
            then the same.
    """

    student_sampler: SamplerSpec = field(
        default=SamplerSpec(steps=4, shift=8.0, stochastic=True),
        validator=[_is_unguided, can_be_left_early],
    )
    past: Literal["mixed", "noisy", "clean"] = field(
        default="mixed", validator=in_(("mixed", "noisy", "clean"))
    )

    @property
    def roles(self) -> tuple[RoleNeed, ...]:
        """The student alone: the teacher was called when the trajectories were made."""
        return (STUDENT,)

    @property
    def trajectory_times(self) -> tuple[float, ...]:
        """Levels t that the student is trained at, falling."""
        return self.student_levels

    def metrics(self, iteration: int) -> tuple[str, ...]:
        """See ``MethodConfig.metrics``."""
        return (*super().metrics(iteration), "mean_t")

    @property
    def health_metrics(self) -> Mapping[HealthKind, str]:
        """See ``MethodConfig.health_metrics``: the loss is a distance from what is learned."""
        return {"student_loss": "loss/total_loss"}

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Capabilities that the adapter must have."""
        if self.past == "clean":
            return (
                "pred:x0",
                ONE_TENSOR,
                "supports_teacher_forcing",
                f"causal:{STUDENT.name}",
            )
        return ("pred:x0", ONE_TENSOR)

    def update_share(self, role: str, low: float, high: float) -> float:
        """See ``MethodConfig.update_share``."""
        return fraction_within(self.trajectory_times, low, high)
