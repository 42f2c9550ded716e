"""What is asked for, beside the models. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from attrs import frozen


@frozen(kw_only=True)
class Request:
    """What is sampled, and where the files go.

    Attributes:
        images: first frames: none, one for all prompts, or one for each.
        seed: of the first clip; clip n has ``seed + n``.
        batch: clips at once.
        latent_frames: of a streamed video; None: whole clips.
        negative_prompt: None: the run's.
        to: folder of the files.
        format: of clips of several frames.
    """

    prompts: tuple[str, ...]
    images: tuple[Path, ...]
    seed: int
    batch: int
    latent_frames: int | None
    negative_prompt: str | None
    to: Path
    format: Literal["mp4", "gif", "png"]
    fps: float
