"""Options of streaming long tuning. No torch here: run files are checked without it."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import field, frozen
from distill_protocols import ONE_TENSOR, PlannedRun, Problem
from distill_protocols.validators import at_least, within

from distill_methods.chunks import Divide, ends_of_chunks
from distill_methods.distribution_matching.config import MatchingConfig
from distill_methods.roles import STUDENT


@frozen(kw_only=True)
class StreamingConfig(MatchingConfig):
    """Streaming long tuning (Yang et al. 2025, LongLive) with DMD as its loss.

    A window is as long as the run's clips, which is what teacher and critic know. The family
    decides how the student divides a video, and how much of it a chunk sees
    (``pipeline_config.causal``). Frames are latent frames.

    Attributes:
        video_frames: how long a video becomes at most: its first window, and as many more as fit.
            Then a new one begins. LongLive: 240; FastVideo: 39.
        overlap_frames: how many frames of a window are the last of the one before, which have no
            loss of the student's. 0: windows follow each other.
        switch_probability: how often a video goes on, at a window after the first, under the prompt
            of the batch instead of its own. The past is then made anew under the new prompt.
    """

    video_frames: int = field(default=240, validator=at_least(1, "a video has frames"))
    overlap_frames: int = field(default=3, validator=at_least(0, "it is a number of frames"))
    switch_probability: float = field(default=0.0, validator=within(0, 1, "it is a probability"))

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Capabilities that the adapter must have."""
        return (*super().capabilities, ONE_TENSOR, "supports_kv_cache", f"causal:{STUDENT.name}")

    @property
    def needs_latents(self) -> bool:
        """Whether clips of the data are read: captions are enough."""
        return False

    def rollout_times(self, low: float, high: float) -> tuple[float, ...]:
        """See ``LatentMethodConfig.rollout_times``: a finished chunk is called once more."""
        return (*self.levels_until(low, high), self.student_sampler.context_noise)

    def metrics(self, iteration: int) -> tuple[str, ...]:
        """See ``MethodConfig.metrics``."""
        return (*super().metrics(iteration), "video_frame")

    def problems(self, run: PlannedRun) -> Iterator[Problem]:
        """See ``MethodConfig.problems``; windows are held against the clip and its chunks."""
        yield from super().problems(run)
        divide = run.chunks
        if divide is None or STUDENT.name not in run.roles:
            return
        for frames in run.clip_frames:
            yield from window_problems(self, lambda n: divide(STUDENT.name, n), frames)


def window_ends(config: StreamingConfig, clip_frames: int) -> tuple[int, ...]:
    """Return where the windows of a video end; none where not even the first fits."""
    step = clip_frames - config.overlap_frames
    if step < 1:
        return ()
    return tuple(range(clip_frames, config.video_frames + 1, step))


def window_problems(config: StreamingConfig, divide: Divide, clip_frames: int) -> Iterator[Problem]:
    """Say why a video of the config cannot be made window by window."""
    if config.gan is not None:
        yield Problem(
            "gan",
            "a discriminator compares with clips of the data under the same prompts, and the "
            "windows have those of their videos. Leave it out",
        )
    if config.overlap_frames >= clip_frames:
        yield Problem(
            "overlap_frames",
            f"{config.overlap_frames} must be less than the {clip_frames} latent frames of the "
            "run's clips, as a window has so many: nothing in it would be new",
        )
        return
    ends = window_ends(config, clip_frames)
    if len(ends) < 2:
        yield Problem(
            "video_frames",
            f"{config.video_frames}: a window has the {clip_frames} latent frames of the run's "
            f"clips, and the next one {clip_frames - config.overlap_frames} new ones, so a video "
            "would end with its first window, as in self_forcing. Give more, or use self_forcing",
        )
        return
    allowed = ends_of_chunks(divide, ends[-1])
    if not set(ends) <= set(allowed):
        yield Problem(
            "overlap_frames",
            f"{config.overlap_frames}: the windows of a video then end at frames {list(ends[:4])} "
            f"..., and chunks end at {allowed[:6]} ...: chunks stay whole. Give as many as some "
            "chunks have, and clips of whole chunks",
        )
