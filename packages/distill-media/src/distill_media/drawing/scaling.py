"""Sizes of pictures that people look at. Letters: T frames, H and W pixels, N clips."""

from __future__ import annotations

import numpy as np
from PIL import Image


def check_clip(frames: np.ndarray) -> np.ndarray:
    """Return ``frames``, if they are a clip.

    Raises:
        ValueError: they are not [T, H, W, 3] uint8.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(
            f"a clip of shape {frames.shape} and type {frames.dtype}: [T, H, W, 3] uint8 is "
            "needed, because frames are written as RGB; take one clip of a batch, and convert "
            "tensors by distill_runtime.to_uint8."
        )
    return frames


def enlarge(frames: np.ndarray, smallest_side: int) -> np.ndarray:
    """Enlarge [..., H, W, 3] by the smallest whole factor that brings both sides to
    ``smallest_side`` pixels.

    Pixel edges stay hard: an interpolated 32-pixel digit looks blurred, and blur is just what
    people judge by the picture.
    """
    scale = max(1, -(-smallest_side // min(frames.shape[-3:-1])))
    return frames if scale == 1 else frames.repeat(scale, -3).repeat(scale, -2)


def shrink(frames: np.ndarray, longest_side: int) -> np.ndarray:
    """Reduce [..., H, W, 3] by area means until no side is longer than ``longest_side``."""
    height, width = frames.shape[-3:-1]
    if max(height, width) <= longest_side:
        return frames
    scale = longest_side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    flat = frames.reshape(-1, height, width, 3)
    small = [np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BOX)) for f in flat]
    return np.stack(small).reshape(*frames.shape[:-3], size[1], size[0], 3)


def scale_to_height(frame: np.ndarray, height: int) -> np.ndarray:
    """Scale one frame [H, W, 3] to ``height`` rows; a lower one is enlarged by the smallest whole
    factor that reaches it, with hard pixel edges.
    """
    own_height, width = frame.shape[:2]
    if own_height <= height:
        scale = -(-height // own_height)
        return frame.repeat(scale, 0).repeat(scale, 1)
    size = (max(1, round(width * height / own_height)), height)
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))


def pad_to_even(frames: np.ndarray) -> np.ndarray:
    """Repeat the last row and column of [T, H, W, 3] where H or W is odd."""
    height, width = frames.shape[1:3]
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def side_by_side(clips: np.ndarray, gap: int = 2) -> np.ndarray:
    """Arrange clips [N, T, H, W, 3] as one [T, H, N (W + gap), 3], with black gaps."""
    padded = np.pad(clips, ((0, 0), (0, 0), (0, 0), (0, gap), (0, 0)))
    n, t, h, w, c = padded.shape
    return padded.transpose(1, 2, 0, 3, 4).reshape(t, h, n * w, c)
