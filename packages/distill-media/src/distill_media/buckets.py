"""Which shape a video is brought to, and which part of each frame is kept. Numbers alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

from attrs import frozen


@frozen(order=True)
class ClipShape:
    """Frames, height and width of a clip in pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames} x {self.height} x {self.width}"


@frozen
class Framing:
    """How a frame becomes one of a bucket: scaled to ``scaled_*``, then cut out at (top, left)."""

    scaled_height: int
    scaled_width: int
    top: int
    left: int
    height: int
    width: int


@frozen(kw_only=True)
class Bars:
    """Black bars around a picture, as shares of its height and width."""

    top: float = 0.0
    bottom: float = 0.0
    left: float = 0.0
    right: float = 0.0

    @property
    def height(self) -> float:
        """Share of the rows that is none of a bar."""
        return 1 - self.top - self.bottom

    @property
    def width(self) -> float:
        """Share of the columns that is none of a bar."""
        return 1 - self.left - self.right


NO_BARS = Bars()


class NoBucketError(ValueError):
    """No bucket fits; the message states why."""


def choose_bucket(
    frames: int, height: float, width: float, buckets: Sequence[ClipShape], *, upscale: bool
) -> ClipShape:
    """Choose the bucket of the nearest aspect ratio; of equally near ones the longest, then the
    largest.

    Args:
        frames: available at the model's rate.
        height: as displayed; ``width`` likewise.
        upscale: take buckets larger than the video too; where none fits without.

    Raises:
        NoBucketError: the video is too short or too small for each.
    """
    short = [shape for shape in buckets if shape.frames <= frames]
    if not short:
        shortest = min(shape.frames for shape in buckets)
        raise NoBucketError(
            f"it has {frames} frame{'s' if frames != 1 else ''} at the rate of the clips, and the "
            f"shortest bucket takes {shortest}. Use longer clips, or add a shorter bucket"
        )
    fitting = [shape for shape in short if shape.height <= height and shape.width <= width]
    if not fitting and not upscale:
        smallest = min(short, key=lambda shape: shape.height * shape.width)
        raise NoBucketError(
            f"it is {width:g} x {height:g} (width x height), smaller than every bucket that it is "
            f"long enough for (the smallest: {smallest.width} x {smallest.height}), and would be "
            "blurred by enlarging. Add a smaller bucket, or set upscale: true"
        )
    aspect = math.log(width / height)

    def rank(shape: ClipShape) -> tuple[float, int, int]:
        distance = abs(math.log(shape.width / shape.height) - aspect)
        return (round(distance, 6), -shape.frames, -shape.height * shape.width)

    if fitting:
        return min(fitting, key=rank)
    return min(short, key=lambda shape: (shape.height * shape.width, rank(shape)))


def frame_for(
    shape: ClipShape,
    height: float,
    width: float,
    *,
    crop: Literal["center", "random"],
    seed: int,
    name: str,
    bars: Bars = NO_BARS,
) -> Framing:
    """Cover the bucket with the frame, and cut off what stands out. No bars are ever added.

    Args:
        height: of the frame as displayed; ``width`` likewise.
        name: of the clip; with ``seed`` it decides a random crop.
        bars: that are no part of the picture, and cut off first.
    """
    scale = max(shape.height / (height * bars.height), shape.width / (width * bars.width))
    # Rounded, not cut off: a scale that rounds to 479.9999 rows covers 480.
    scaled_height = max(shape.height, round(height * scale))
    scaled_width = max(shape.width, round(width * scale))
    spare = (
        max(0, round(height * bars.height * scale) - shape.height),
        max(0, round(width * bars.width * scale) - shape.width),
    )
    if crop == "random":
        digest = hashlib.sha256(f"{seed}\n{name}".encode("utf-8", "surrogatepass")).digest()
        draws = (int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big"))
        top, left = (draw % (rest + 1) for draw, rest in zip(draws, spare, strict=True))
    else:
        top, left = (rest // 2 for rest in spare)
    top = min(top + round(height * bars.top * scale), scaled_height - shape.height)
    left = min(left + round(width * bars.left * scale), scaled_width - shape.width)
    return Framing(scaled_height, scaled_width, top, left, shape.height, shape.width)
