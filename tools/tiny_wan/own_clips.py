"""Own clips with captions, as small as the tiny model: what `apps/preprocess` reads."""

from pathlib import Path

import attrs
import numpy as np
import torch
from distill_media import (
    CaptionsConfig,
    ClipShape,
    CutConfig,
    MediaError,
    SourceConfig,
    read_clips,
    read_items,
)

FEWEST = 2
"""Clips that anything can be measured of."""
HELD_OUT = 10
"""Every tenth clip is not trained on by the VAE, and tells how good it is."""


@attrs.frozen(kw_only=True)
class OwnClips:
    """Which clips are read, and how they are cut.

    Attributes:
        folder: of videos, with the caption of `a.mp4` in `a.txt` beside it.
        shape: frames, height and width that they are brought to.
        fps: frames a second.
        stride: frames between the beginnings of two clips of one video.
    """

    folder: Path
    shape: ClipShape
    fps: float
    stride: int


@attrs.frozen(eq=False)
class CaptionedClips:
    """Clips `[N, T, H, W, 3]` uint8 and a caption of each."""

    frames: np.ndarray
    captions: list[str]

    def read(self, picks: torch.Tensor) -> torch.Tensor:
        """Return clips by their numbers: `[B, 3, T, H, W]` in [0, 1]."""
        chosen = torch.from_numpy(self.frames[picks.numpy()])
        return chosen.movedim(-1, 1).float() / 255

    @property
    def trained(self) -> torch.Tensor:
        """Numbers of the clips that the VAE is trained on."""
        numbers = torch.arange(len(self.frames))
        few = len(numbers) < HELD_OUT
        return numbers if few else numbers[numbers % HELD_OUT != HELD_OUT - 1]

    @property
    def held_out(self) -> torch.Tensor:
        """Numbers of the others; of too few clips all."""
        numbers = torch.arange(len(self.frames))
        few = len(numbers) < HELD_OUT
        return numbers if few else numbers[numbers % HELD_OUT == HELD_OUT - 1]

    @property
    def distinct_captions(self) -> list[str]:
        return list(dict.fromkeys(self.captions))


def read_own_clips(config: OwnClips) -> CaptionedClips:
    """Read and cut all clips; what cannot be used is named and left out.

    SystemExit if fewer than two are left.
    """
    frames, captions = [], []
    cut = CutConfig(fps=config.fps, take="windows", stride=config.stride)
    source = SourceConfig(folder=str(config.folder.resolve()))
    try:
        items = list(read_items([source], CaptionsConfig()))
    except MediaError as error:
        raise SystemExit(str(error)) from error
    for item in items:
        if item.problem is not None or not item.captions:
            print(f"{item.id}: left out: {item.problem or 'it has no caption'}")
            continue
        try:
            for clip in read_clips(item, [config.shape], cut):
                frames.append(clip.frames)
                captions.append(item.captions[0])
        except MediaError as error:
            print(f"left out: {error}")
    if len(frames) < FEWEST:
        raise SystemExit(
            f"{config.folder} gives {len(frames)} clips of {config.shape.frames} frames, and at "
            f"least {FEWEST} are needed. Put videos there with captions beside them, `a.mp4` and "
            "`a.txt`."
        )
    return CaptionedClips(np.stack(frames), captions)
