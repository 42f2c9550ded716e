"""Videos, pictures and tables for tests, written by PyAV and Pillow. No import of torch."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

RED, GREEN, BLUE, GREY = (220, 30, 30), (30, 200, 30), (30, 30, 220), (128, 128, 128)


def numbered_frames(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Return frames [F, H, W, 3] of one grey each, 4 levels apart, to recognise each by."""
    levels = np.arange(count, dtype=np.uint8) * 4 + 20
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def frame_numbers(frames: np.ndarray) -> list[int]:
    """Read the numbers of ``numbered_frames`` off decoded frames."""
    return [round((float(frame.mean()) - 20) / 4) for frame in frames]


def quarters(count: int = 3, height: int = 64, width: int = 96) -> np.ndarray:
    """Return frames with red, green / blue, grey quarters, which show their orientation."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    for row, colors in enumerate([(RED, GREEN), (BLUE, GREY)]):
        for column, color in enumerate(colors):
            rows = slice(row * height // 2, (row + 1) * height // 2)
            frames[:, rows, column * width // 2 : (column + 1) * width // 2] = color
    return frames


def moving_frames(count: int, height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray:
    """Return frames of a texture that moves to the right, one pixel a frame."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(40, 220, (height // 8 + 1, width // 8 + count, 3), np.uint8)
    wide = coarse.repeat(8, 0).repeat(8, 1)[:height]
    return np.stack([wide[:, count - n : count - n + width] for n in range(count)])


def write_video(
    path: Path,
    frames: np.ndarray,
    *,
    fps: float = 8,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times: Sequence[float] | None = None,
    audio: bool = False,
    options: Mapping[str, str] | None = None,
    source_format: str = "rgb24",
) -> Path:
    """Write frames [F, H, W, 3 or 4] as a video.

    Args:
        times: seconds of each frame, for a variable rate.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options=dict(options or {}))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if codec == "libx264" and not options:
            stream.options = {"crf": "4"}
        sound = container.add_stream("aac", rate=8000) if audio else None
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=source_format)
            if times is not None:
                frame.pts, frame.time_base = round(times[number] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            _write_silence(container, sound, len(frames) / fps)
    return path


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        _write_silence(container, container.add_stream("aac", rate=8000), 0.5)
    return path


def _write_silence(container, stream, seconds: float) -> None:
    samples = np.zeros((1, int(8000 * seconds)), np.float32)
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
    frame.sample_rate = 8000
    container.mux(stream.encode(frame))
    container.mux(stream.encode())


MATRICES = {
    90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0), "mirrored": (-1, 0, 0, 1),
    "odd": (1, 1, -1, 1),
}  # fmt: skip
"""By degrees clockwise: a, b, c, d of a display matrix."""


def set_matrix(path: Path, turn: int | str) -> Path:
    """Give an MP4 a display matrix, as a phone that is held sideways does."""
    a, b, c, d = (value << 16 for value in MATRICES[turn])
    content = path.read_bytes()
    place = content.index(b"tkhd") + 4 + 40
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content[:place] + matrix + content[place + 36 :])
    return path


def write_picture(path: Path, pixels: np.ndarray, *, orientation: int = 1) -> Path:
    """Write pixels [H, W, 3 or 4]; ``orientation`` is that of EXIF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if orientation != 1:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(path, exif=exif, quality=95)
    else:
        image.save(path)
    return path


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
