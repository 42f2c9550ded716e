"""Clips as MP4, GIF and WebP. Letters: T frames, H and W pixels, N clips."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, Literal

import av
import numpy as np
from distill_runtime import replace_file
from PIL import Image

from distill_media.drawing.scaling import check_clip, enlarge, pad_to_even, side_by_side

# Without mbtree: x264's look-ahead for it reads memory that nobody wrote, so that equal frames
# became other files now and then.
_X264 = {"mbtree": "0"}
_CRF = 12


def write_mp4(
    frames: np.ndarray, path: Path | str, *, fps: float = 8, smallest_side: int = 256
) -> None:
    """Write one clip [T, H, W, 3] uint8 as H.264, enlarged as ``Mp4Writer`` does.

    Raises:
        ValueError: it has another shape or type.
    """
    check_clip(frames)
    with (
        replace_file(path) as staging,
        Mp4Writer(staging, fps=fps, smallest_side=smallest_side) as video,
    ):
        video.add(frames)


def read_mp4(path: Path | str) -> np.ndarray:
    """Read all frames of a clip that ``write_mp4`` wrote, [T, H, W, 3] uint8, enlarged as it is.

    For files of our own: it knows no rotation, and no limit of sizes.

    Raises:
        OSError: it is not there, or no video.
    """
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def encode_mp4(frames: np.ndarray, *, fps: float, smallest_side: int = 1, crf: int = _CRF) -> bytes:
    """Encode one clip [T, H, W, 3] uint8 as ``Mp4Writer`` does, in memory.

    Raises:
        ValueError: it has another shape or type.
    """
    check_clip(frames)
    buffer = io.BytesIO()
    with Mp4Writer(buffer, fps=fps, smallest_side=smallest_side, crf=crf) as video:
        video.add(frames)
    return buffer.getvalue()


class Mp4Writer:
    """An H.264 file that is written as frames come; complete at the end of its `with` block.

    On one machine, equal frames give equal bytes.

    Args:
        target: path of the file, or a buffer.
        fps: frames per second.
        smallest_side: each pixel is enlarged by the smallest whole factor that reaches it.
        crf: x264's constant rate factor: 12 shows no loss, and each 6 more halve the size.
    """

    def __init__(
        self,
        target: Path | str | BinaryIO,
        *,
        fps: float,
        smallest_side: int = 1,
        crf: int = _CRF,
    ) -> None:
        file = str(target) if isinstance(target, Path | str) else target
        self._container = av.open(file, "w", format=None if isinstance(file, str) else "mp4")
        self._options = {**_X264, "crf": str(crf)}
        self._fps = Fraction(fps).limit_denominator(1000)
        self._smallest_side = smallest_side
        self._stream: av.VideoStream | None = None

    def add(self, frames: np.ndarray) -> None:
        """Append frames [T, H, W, 3] uint8, of the size of those before.

        Raises:
            ValueError: they have another shape or type.
        """
        # Even sides: yuv420p stores colour for blocks of 2 x 2.
        pixels = pad_to_even(enlarge(check_clip(frames), self._smallest_side))
        if self._stream is None:
            self._stream = self._container.add_stream(
                "libx264", rate=self._fps, options=dict(self._options)
            )
            self._stream.height, self._stream.width = pixels.shape[1:3]
            self._stream.pix_fmt = "yuv420p"  # the only layout that browsers and phones all play
        for frame in pixels:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            self._container.mux(self._stream.encode(picture))

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._stream is not None:
                self._container.mux(self._stream.encode())
        finally:
            self._container.close()


def clips_to_gif(clips: np.ndarray, fps: float) -> bytes:
    """Encode clips [N, T, H, W, 3] uint8 side by side as one GIF that repeats without end.

    GIF rounds a frame's time to 10 ms.
    """
    return encode_animation(side_by_side(clips), "GIF", fps)


def encode_animation(
    frames: np.ndarray, format: Literal["GIF", "WEBP"], fps: float, *, quality: int = 80
) -> bytes:
    """Encode [T, H, W, 3] uint8 as a picture that moves and repeats without end.

    Args:
        quality: of WebP, up to 100.
    """
    pictures = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer,
        format,
        save_all=True,
        append_images=pictures[1:],
        duration=max(10, round(1000 / fps)),
        loop=0,
        quality=quality,
    )
    return buffer.getvalue()
