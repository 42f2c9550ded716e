"""What is asked for, beside the models. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from attrs import frozen
from distill_protocols import GivenFrames


@frozen(kw_only=True)
class Request:
    """What is sampled, and where the files go.

    Attributes:
        images: first frames: none, one for all prompts, or one for each.
        last_images: beside them last frames, as many.
        videos: instead of images, videos that the clips go on from: one for all, or one for each.
        video_frames: so many last frames of a video are the first ones of its clip.
        seed: of the first clip; clip n has ``seed + n``.
        batch: clips at once.
        latent_frames: of a streamed video; None: whole clips.
        negative_prompt: None: the run's.
        to: folder of the files.
        format: of clips of several frames.
    """

    prompts: tuple[str, ...]
    images: tuple[Path, ...]
    last_images: tuple[Path, ...]
    videos: tuple[Path, ...]
    video_frames: int
    seed: int
    batch: int
    latent_frames: int | None
    negative_prompt: str | None
    to: Path
    format: Literal["mp4", "gif", "png"]
    fps: float

    @property
    def given(self) -> GivenFrames:
        """The frames that are given of each clip."""
        first = self.video_frames if self.videos else int(bool(self.images))
        return GivenFrames(first=first, last=bool(self.last_images))
