"""Clips that were written for people, read back whole. Letters: T frames, H and W pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from attrs import frozen
from PIL import Image, ImageSequence, UnidentifiedImageError

from distill_media.errors import MediaError
from distill_media.items import MediaPlace
from distill_media.video import VideoError, open_video

PICTURE_SUFFIXES = (".gif", ".png", ".webp")
MOST_FRAMES = 2_000
"""Of a clip that is read; what comes after them is left out."""
MOST_PIXELS = 1 << 24
"""Of a frame, a clip beside clips included."""
MOST_BYTES = 1 << 28
"""Of a file, and of all frames together (as [T, H, W, 3] uint8)."""
_STILL_FPS = 1.0


@frozen(eq=False, kw_only=True)
class Animation:
    """A clip as it is shown.

    Attributes:
        frames: [T, H, W, 3] uint8; T is 1 for a still picture.
        fps: frames per second.
    """

    frames: np.ndarray
    fps: float


def read_animation(path: Path, *, most_frames: int = MOST_FRAMES) -> Animation:
    """Read an MP4, GIF, WebP or PNG. Files may be damaged or hostile: sizes are limited.

    Args:
        most_frames: what comes after them is not decoded.

    Raises:
        MediaError: it is none of these, damaged, or too large.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise VideoError(f"it has more than {MOST_BYTES:,} bytes, which is no clip to be shown")
        if path.suffix.lower() in PICTURE_SUFFIXES:
            return _read_picture(path, most_frames)
        return _read_video(path, most_frames)
    except VideoError as error:
        raise MediaError(str(path), str(error)) from error
    except OSError as error:
        raise MediaError(str(path), f"it cannot be read ({error.strerror or error})") from error


def _read_video(path: Path, most_frames: int) -> Animation:
    frames: list[np.ndarray] = []
    with open_video(MediaPlace(path, path.name), MOST_PIXELS) as (container, stream):
        fps = float(stream.average_rate or stream.guessed_rate or _STILL_FPS)
        for frame in container.decode(stream):
            frames.append(frame.to_ndarray(format="rgb24"))
            if _is_full(frames, most_frames):
                break
    return _animation(frames, fps)


def _read_picture(path: Path, most_frames: int) -> Animation:
    try:
        with Image.open(path, formats=("GIF", "PNG", "WEBP")) as image:
            if image.width * image.height > MOST_PIXELS:
                raise VideoError(f"it is {image.width} x {image.height}; scale it down")
            frames, durations = [], []
            for frame in ImageSequence.Iterator(image):
                frames.append(np.asarray(frame.convert("RGB")))
                durations.append(frame.info.get("duration", 0))
                if _is_full(frames, most_frames):
                    break
    except UnidentifiedImageError as error:
        raise VideoError("it is no GIF, WebP or PNG") from error
    except (SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"it is damaged ({error})") from error
    shown = sum(value for value in durations if isinstance(value, int | float) and value > 0)
    return _animation(frames, 1000 * len(frames) / shown if shown else _STILL_FPS)


def _is_full(frames: list[np.ndarray], most_frames: int) -> bool:
    return len(frames) >= most_frames or frames[0].nbytes * (len(frames) + 1) > MOST_BYTES


def _animation(frames: list[np.ndarray], fps: float) -> Animation:
    if not frames:
        raise VideoError("it has no frame")
    alike = [frame for frame in frames if frame.shape == frames[0].shape]
    return Animation(frames=np.stack(alike), fps=min(max(fps, 0.1), 240.0))
