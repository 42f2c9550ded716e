"""Options of finetuning. No torch here: run files are checked without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from attrs import field, frozen
from attrs.validators import in_
from distill_protocols import ONE_TENSOR, HealthKind, RoleNeed, SamplerSpec

from distill_methods.latent_config import LatentMethodConfig
from distill_methods.roles import STUDENT
from distill_methods.time_sampling import MAX_T, TimeSampling, probability_within


def _is_noisier_than_context(
    config: FinetuneConfig, _attribute: object, value: float | None
) -> None:
    if value is None:
        return
    if config.past != "clean":
        raise ValueError(
            f"{value} has no effect: with past: noisy chunks see the noised chunks of the same "
            "call. Set past: clean, or leave it out"
        )
    if not config.student_sampler.context_noise < value <= MAX_T:
        raise ValueError(
            f"{value} must lie above student_sampler.context_noise "
            f"({config.student_sampler.context_noise:g}) and at most at 1000, which is pure noise"
        )


@frozen(kw_only=True)
class FinetuneConfig(LatentMethodConfig):
    """Flow matching on data. Condition dropout belongs to the data loader.

    Attributes:
        time: the t at which the student is trained.
        weighting: none: every t counts alike (FastGen, FastVideo). bsmntw: a bell over t that is
            0 at both ends (DiffSynth-Studio).
        times: per_clip: one t a sample. per_chunk: an independent one for each chunk of a causal
            student (diffusion forcing, Chen et al. 2024).
        past: what a chunk of a causal student sees of those before it. noisy: the noised chunks of
            the same call. clean: the data (teacher forcing), noised to
            ``student_sampler.context_noise``, as in sampling; a call is then twice as long.
        past_t_max: the clean past is noised to a t drawn for each clip, uniform between
            ``context_noise`` and this, so that the student learns not to trust what it made; left
            out: always to ``context_noise``.
        student_sampler: how the student is sampled in validation and export, guidance included.
    """

    time: TimeSampling = field(default=TimeSampling(shift=5.0))
    weighting: Literal["none", "bsmntw"] = field(default="none", validator=in_(("none", "bsmntw")))
    times: Literal["per_clip", "per_chunk"] = field(
        default="per_clip", validator=in_(("per_clip", "per_chunk"))
    )
    past: Literal["noisy", "clean"] = field(default="noisy", validator=in_(("noisy", "clean")))
    student_sampler: SamplerSpec = field(default=SamplerSpec(steps=50, shift=5.0, guidance=5.0))
    past_t_max: float | None = field(default=None, validator=_is_noisier_than_context)

    @property
    def roles(self) -> tuple[RoleNeed, ...]:
        """The student alone."""
        return (STUDENT,)

    @property
    def needs_negative(self) -> bool:
        """Whether the student's sampler needs a negative condition; a step never does."""
        return self.student_sampler.guided

    @property
    def health_metrics(self) -> Mapping[HealthKind, str]:
        """See ``MethodConfig.health_metrics``: the loss is a distance from what is learned."""
        return {"student_loss": "loss/total_loss"}

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Capabilities that the adapter must have."""
        optional_names = {
            "supports_cfg": self.needs_negative,
            ONE_TENSOR: self.times == "per_chunk" or self.past == "clean",
            "supports_frame_times": self.times == "per_chunk",
            "supports_teacher_forcing": self.past == "clean",
            f"causal:{STUDENT.name}": self.times == "per_chunk" or self.past == "clean",
        }
        return ("pred:v", *(name for name, needed in optional_names.items() if needed))

    def update_share(self, role: str, low: float, high: float) -> float:
        """See ``MethodConfig.update_share``."""
        return probability_within(self.time, low, high)
