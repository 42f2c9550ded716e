"""Options of Self-Forcing. No torch here: run files are checked without it."""

from __future__ import annotations

from attrs import field, frozen
from attrs.validators import optional
from distill_protocols.validators import at_least

from distill_methods.distribution_matching.config import MatchingConfig
from distill_methods.roles import STUDENT
from distill_methods.time_sampling import fraction_within


def _has_an_effect(config: SelfForcingConfig, _attribute: object, value: bool) -> None:
    if value and not config.same_step_across_chunks:
        raise ValueError(
            "true has no effect beside same_step_across_chunks: false: the last step is the same "
            "for all chunks. Leave one of the two out"
        )


def _is_rising(_config: object, _attribute: object, value: tuple[int, int]) -> None:
    low, high = value
    if not 1 <= low <= high:
        raise ValueError(
            f"{list(value)} must be [min, max] latent frames with 1 <= min <= max: a rollout's "
            "length is drawn between them"
        )


@frozen(kw_only=True)
class SelfForcingConfig(MatchingConfig):
    """Self-Forcing (Huang et al. 2025, "Self Forcing: Bridging the Train-Test Gap in Autoregressive
    Video Diffusion") with DMD as its loss.

    The family decides how the student divides a video into chunks. How noisy the past of a chunk
    is, is ``student_sampler.context_noise``. Frames are latent frames.

    Attributes:
        same_step_across_chunks: true: all chunks of a rollout exit at the same step. false: each
            at its own.
        last_step_only: no exit step is drawn, it is always the last. If the student has two
            experts, the one for high noise levels is then never trained.
        gradient_frames: only chunks that begin within the last so many frames are called with
            gradient, which bounds the memory of a step; null: all that the scores see.
        rollout_frames: [min, max]: how long rollouts are, drawn for each micro batch, whole chunks
            only. They are at least as long as the run's clips; of a longer one the scores see the
            last frames, as many as a clip has, and the first of these stays out of the student's
            loss. Left out: as long as the clips.
    """

    same_step_across_chunks: bool = True
    last_step_only: bool = field(default=False, validator=_has_an_effect)
    gradient_frames: int | None = field(
        default=21, validator=optional(at_least(1, "the student would never learn"))
    )
    rollout_frames: tuple[int, int] | None = field(default=None, validator=optional(_is_rising))

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Capabilities that the adapter must have."""
        return (*super().capabilities, "supports_kv_cache", f"causal:{STUDENT.name}")

    def update_share(self, role: str, low: float, high: float) -> float:
        """See ``MethodConfig.update_share``."""
        if role == STUDENT.name and self.last_step_only:
            return fraction_within(self.student_levels[-1:], low, high)
        return super().update_share(role, low, high)
