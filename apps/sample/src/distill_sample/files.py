"""Clips as files: one a clip, and sheets of all of them beside each other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from distill_media import (
    Mp4Writer,
    SheetRow,
    clips_to_gif,
    read_last_frames,
    shrink,
    write_contact_sheet,
    write_sheet_gif,
    write_sheet_mp4,
)
from distill_protocols import DataError
from distill_runtime import open_file, replace_file, replace_folder, to_uint8
from PIL import Image, ImageOps
from torch import Tensor

COLUMNS = 6
"""Prompts on one contact sheet."""
THUMBNAIL = 320
"""Pixels of a sheet's pictures at most, on their longer side."""
SMALLEST_SIDE = 256
"""Smaller clips are enlarged by a whole factor, or players blur them."""


def clip_stem(number: int, prompt: str, role: str) -> str:
    """Name a clip's file: its number, the beginning of its prompt and its role."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return "-".join(part for part in (f"{number:03d}", words, role) if part)


def write_clip(clip: Tensor, folder: Path, stem: str, *, format: str, fps: float) -> Path:
    """Write one clip [3, F, H_px, W_px] in [0, 1]; a clip of one frame is a PNG."""
    frames = to_uint8(clip).numpy()
    if len(frames) == 1:
        path = folder / f"{stem}.png"
        with replace_file(path) as part:
            Image.fromarray(frames[0]).save(part, format="PNG")
        return path
    path = folder / f"{stem}.{format}"
    if format == "gif":
        with replace_file(path) as part:
            part.write_bytes(clips_to_gif(frames[None], fps))
    elif format == "png":
        path = folder / stem
        with replace_folder(path) as stage:
            for number, frame in enumerate(frames):
                Image.fromarray(frame).save(stage / f"{number:04d}.png")
    else:
        write_stream([clip], path, fps=fps)
    return path


def write_stream(parts: Iterable[Tensor], path: Path, *, fps: float) -> None:
    """Write an MP4 of frames [3, F, H_px, W_px] as they come, a part at a time in memory.

    Where an interrupt (Ctrl-C) ends it the file has the parts of before, and the interrupt goes on.
    """
    interrupt, count = None, 0
    with replace_file(path) as part, Mp4Writer(part, fps=fps, smallest_side=SMALLEST_SIDE) as video:
        try:
            for frames in parts:
                video.add(to_uint8(frames).numpy())
                count += 1
        except KeyboardInterrupt as error:
            if not count:
                raise
            interrupt = error
    if interrupt is not None:
        raise interrupt


def find_clip(folder: Path, stem: str, format: str) -> Path | None:
    """Return what ``write_clip`` wrote; None: nothing yet."""
    names = (f"{stem}.png", stem if format == "png" else f"{stem}.{format}")
    return next((path for name in names if (path := folder / name).exists()), None)


def thumbnails(clips: Tensor) -> Tensor:
    """Reduce clips [B, 3, F, H_px, W_px] in [0, 1] to what a sheet shows, [B, F, H, W, 3] uint8."""
    return torch.from_numpy(shrink(to_uint8(clips).numpy(), THUMBNAIL).copy())


def write_sheets(
    rows: Sequence[tuple[str, Tensor]],
    prompts: Sequence[str],
    folder: Path,
    *,
    format: str,
    fps: float,
) -> Iterator[Path]:
    """Write a contact sheet for each ``COLUMNS`` prompts: a picture, and beside MP4s and GIFs one
    in motion, of their format.

    Args:
        rows: label and thumbnails [B, F, H, W, 3] uint8 of each role, a clip a prompt.
    """
    write_film = {"mp4": write_sheet_mp4, "gif": write_sheet_gif}.get(format)
    for first in range(0, len(prompts), COLUMNS):
        part = slice(first, first + COLUMNS)
        sheet = [SheetRow(label, clips[part].numpy()) for label, clips in rows]
        number = f"_{first // COLUMNS + 1}" if len(prompts) > COLUMNS else ""
        picture = folder / f"contact_sheet{number}.png"
        write_contact_sheet(sheet, prompts[part], picture)
        yield picture
        if write_film is not None and all(clips.shape[1] > 1 for _, clips in rows):
            film = folder / f"contact_sheet{number}.{format}"
            write_film(sheet, prompts[part], film, fps=fps)
            yield film


def read_pictures(paths: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Read pictures as frames [B, 3, H_px, W_px] in [0, 1], scaled and cropped to ``size`` (height,
    width) about their middle.

    Raises:
        DataError: a file is no picture.
    """
    frames = []
    for path in paths:
        try:
            with open_file(path) as content, Image.open(content) as file:
                upright = ImageOps.exif_transpose(file).convert("RGB")
                picture = ImageOps.fit(upright, (size[1], size[0]), Image.Resampling.LANCZOS)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{path} cannot be read as a picture ({error}), and no frame of a clip can be made "
                "of it. Save it again, or name another"
            ) from error
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        frames.append(pixels.view(*size, 3).permute(2, 0, 1).float() / 255)
    return torch.stack(frames)


def read_video_ends(paths: Sequence[Path], count: int, size: tuple[int, int]) -> Tensor:
    """Read the last ``count`` frames of videos as [B, 3, count, H_px, W_px] in [0, 1], scaled and
    cropped to ``size`` (height, width) about their middle.

    Raises:
        DataError: a file is no video, or is shorter.
    """
    ends = [torch.from_numpy(read_last_frames(path, count, size)) for path in paths]
    return torch.stack(ends).permute(0, 4, 1, 2, 3).float() / 255
