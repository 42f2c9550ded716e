"""Options of Self-Forcing. No torch here: run files are checked without it."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import evolve, field, frozen
from attrs.validators import optional
from distill_protocols import ONE_TENSOR, ExitSpec, PlannedRun, Problem
from distill_protocols.validators import at_least

from distill_methods.chunks import Divide, ends_of_chunks
from distill_methods.distribution_matching.config import MatchingConfig
from distill_methods.exits import exit_weights
from distill_methods.roles import STUDENT


def _has_an_effect(config: SelfForcingConfig, _attribute: object, value: bool) -> None:
    if value and not config.same_step_across_chunks:
        raise ValueError(
            "true has no effect beside same_step_across_chunks: false: the last step is the same "
            "for all chunks. Leave one of the two out"
        )


def _last_is_all(config: SelfForcingConfig, _attribute: object, value: bool) -> None:
    if value and config.exit != "uniform":
        raise ValueError(
            f"true beside exit: {config.exit}: it is exit: last, written otherwise. Leave one of "
            "the two out"
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
        last_step_only: no exit step is drawn, it is always the last, as with ``exit: last``. If the
            student has two experts, the one for high noise levels is then never trained.
        gradient_frames: only chunks that begin within the last so many frames are called with
            gradient, which bounds the memory of a step; null: all that the scores see.
        rollout_frames: [min, max]: how long rollouts are, drawn for each micro batch, whole chunks
            only. They are at least as long as the run's clips; of a longer one the scores see the
            last frames, as many as a clip has, and the first of these stays out of the student's
            loss. Left out: as long as the clips.
    """

    same_step_across_chunks: bool = True
    last_step_only: bool = field(default=False, validator=[_has_an_effect, _last_is_all])
    gradient_frames: int | None = field(
        default=21, validator=optional(at_least(1, "the student would never learn"))
    )
    rollout_frames: tuple[int, int] | None = field(default=None, validator=optional(_is_rising))

    @property
    def always_exits_last(self) -> bool:
        """Whether no exit step is drawn."""
        return self.last_step_only or self.exit == "last"

    @property
    def exit_weights(self) -> tuple[float, ...]:
        """See ``LatentMethodConfig.exit_weights``."""
        choice = "last" if self.always_exits_last else self.exit
        return exit_weights(choice, self.student_sampler.steps)

    @property
    def told_exits(self) -> ExitSpec | None:
        """See ``MatchingConfig.told_exits``: of each chunk, where they differ."""
        told = super().told_exits
        return told and evolve(told, by_frame=not self.same_step_across_chunks)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Capabilities that the adapter must have."""
        by_frame = self.told_exits is not None and self.told_exits.by_frame
        frame_times = ("supports_frame_times",) if by_frame else ()
        causal = ("supports_kv_cache", f"causal:{STUDENT.name}")
        return (*super().capabilities, ONE_TENSOR, *frame_times, *causal)

    @property
    def needs_latents(self) -> bool:
        """Whether a discriminator is shown clips of the data."""
        return self.gan is not None

    def rollout_times(self, low: float, high: float) -> tuple[float, ...]:
        """See ``LatentMethodConfig.rollout_times``: a finished chunk is called once more."""
        levels = self.student_levels if self.always_exits_last else self.levels_until(low, high)
        return (*levels, self.student_sampler.context_noise)

    def problems(self, run: PlannedRun) -> Iterator[Problem]:
        """See ``MethodConfig.problems``; rollouts are held against the clip and its chunks."""
        yield from super().problems(run)
        divide = run.chunks
        if divide is None or STUDENT.name not in run.roles:
            return
        for frames in run.clip_frames:
            problems = list(rollout_problems(self, lambda n: divide(STUDENT.name, n), frames))
            yield from problems
            if problems:
                return


def gradient_frames(config: SelfForcingConfig, clip_frames: int) -> int:
    """Return how many frames at the end have gradient: never more than the scores see."""
    if config.gradient_frames is None:
        return clip_frames
    return min(config.gradient_frames, clip_frames)


def rollout_lengths(config: SelfForcingConfig, divide: Divide, clip_frames: int) -> tuple[int, ...]:
    """Return the numbers of latent frames that a rollout may have: whole chunks, at least a clip.

    Empty where ``rollout_problems`` has one of ``rollout_frames``.
    """
    if config.rollout_frames is None:
        return (clip_frames,)
    low, high = config.rollout_frames
    if low < clip_frames:
        return ()
    return tuple(end for end in ends_of_chunks(divide, high) if low <= end)


def rollout_problems(
    config: SelfForcingConfig, divide: Divide, clip_frames: int
) -> Iterator[Problem]:
    """Say why no rollout would have a right length, or none of its chunks gradient."""
    lengths = rollout_lengths(config, divide, clip_frames)
    if not lengths:
        assert config.rollout_frames is not None
        ends = ends_of_chunks(divide, config.rollout_frames[1])
        yield Problem(
            "rollout_frames",
            f"{list(config.rollout_frames)}: a rollout is made of whole chunks, which end at "
            f"frames {ends or 'beyond that'}, and is at least as long as the run's clips of "
            f"{clip_frames} latent frames, because the scores see a whole clip. Give numbers with "
            "such a length between them, or leave it out",
        )
        return
    last_chunk = max(divide(frames)[-1].frames for frames in lengths)
    if last_chunk > gradient_frames(config, clip_frames):
        yield Problem(
            "gradient_frames",
            f"{config.gradient_frames} is less than the {last_chunk} latent frames of the last "
            "chunk, so no chunk would be called with gradient and the student would never learn. "
            "Give at least that, or null",
        )
