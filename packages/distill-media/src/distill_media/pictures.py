"""Reading a still picture by Pillow: a clip of one frame."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import av
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from distill_media.buckets import Framing
from distill_media.items import MediaPlace
from distill_media.orientation import UPRIGHT
from distill_media.video import VideoError, write_rgb

_ORIENTATION = 0x0112
"""Of EXIF: how the picture is turned; from 5 on, rows are shown as columns."""
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")


def read_picture_size(place: MediaPlace, max_pixels: int) -> tuple[int, int]:
    """Read height and width of a picture as it is shown; nothing is decoded.

    Raises:
        VideoError: as ``read_picture``.
        OSError: the file cannot be opened.
    """
    with _open_picture(place, max_pixels) as image:
        width, height = image.size
        turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def read_picture(place: MediaPlace, max_pixels: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read a picture upright, [H, W, 3] uint8 RGB, and what a person should know of it.

    Raises:
        VideoError: it is damaged, too large, or no picture.
        OSError: the file cannot be opened.
    """
    with _open_picture(place, max_pixels) as image:
        return _to_array(ImageOps.exif_transpose(image))


@contextlib.contextmanager
def _open_picture(place: MediaPlace, max_pixels: int) -> Iterator[Image.Image]:
    with place.open() as file:
        if not file.read(1):
            raise VideoError("it is empty (0 bytes). Copy it again, or remove it")
        file.seek(0)
        try:
            with Image.open(file, formats=_FORMATS) as img:
                width, height = img.size  # of the header: nothing is decoded yet
                if width * height > max_pixels:
                    raise VideoError(
                        f"it is {width} x {height}, more than the {max_pixels:,} pixels that are "
                        "read. Scale it down, or raise max_pixels"
                    )
                yield img
        except UnidentifiedImageError as error:
            raise VideoError(
                f"it is no picture that can be read ({', '.join(_FORMATS)}). Convert or remove it"
            ) from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if isinstance(error, VideoError):
                raise
            raise VideoError(f"it is damaged ({error}). Copy it again, or remove it") from error


def frame_picture(pixels: np.ndarray, framing: Framing) -> np.ndarray:
    """Scale and crop a picture [H, W, 3]; [1, H', W', 3]."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    result = np.empty((1, framing.height, framing.width, 3), np.uint8)
    write_rgb(frame, framing, UPRIGHT, result[0], is_video=False)
    return result


def _to_array(image: Image.Image) -> tuple[np.ndarray, tuple[str, ...]]:
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint32) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2), ()
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB")), ()
    rgba = np.asarray(image.convert("RGBA"))
    alpha = rgba[..., 3:].astype(np.uint16)
    pixels = ((rgba[..., :3] * alpha + 127) // 255).astype(np.uint8)
    opaque = bool((alpha == 255).all())
    return pixels, () if opaque else ("is transparent in part; put before black",)
