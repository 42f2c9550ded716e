"""Contact sheets: one picture, or film, of what several models make of several prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import numpy as np
from distill_runtime import printable, replace_file
from PIL import Image, ImageDraw

from distill_media.drawing.encoding import encode_animation, write_mp4
from distill_media.drawing.lettering import Lettering
from distill_media.drawing.scaling import check_clip, enlarge

INK = (20, 20, 20)
PAPER = (250, 250, 250)
_FONT_SIZE = 18
_GAP, _LINE = 12, _FONT_SIZE + 6


@attrs.frozen(eq=False)
class SheetRow:
    """One model's row of a contact sheet.

    Attributes:
        label: text at the left; may have several lines.
        clips: [N, T, H, W, 3] uint8, one a prompt, in the prompts' order.
    """

    label: str
    clips: np.ndarray


def write_contact_sheet(
    rows: Sequence[SheetRow],
    prompts: Sequence[str],
    path: Path | str,
    *,
    frames_shown: int = 3,
    frame_side: int = 96,
    columns: int | None = None,
) -> None:
    """Write one picture: a column a prompt (caption above), a row a model (label at the left), in
    each cell ``frames_shown`` frames spread over the clip from first to last, side by side.

    Every frame is enlarged by a whole factor to at least ``frame_side`` pixels.

    Args:
        columns: more prompts than these are shown below the first; None: all beside each other.

    Raises:
        ValueError: there is no row, or a row has not one clip a prompt.
    """
    sheet = draw_contact_sheet(
        rows, prompts, frames_shown=frames_shown, frame_side=frame_side, columns=columns
    )
    with replace_file(path) as staging:
        Image.fromarray(sheet).save(staging, format="PNG")


def draw_contact_sheet(
    rows: Sequence[SheetRow],
    prompts: Sequence[str],
    *,
    frames_shown: int = 3,
    frame_side: int = 96,
    columns: int | None = None,
) -> np.ndarray:
    """Draw what ``write_contact_sheet`` writes, [H, W, 3] uint8. Same arguments and errors."""
    for row in rows:
        _check_row(row, len(prompts))
    step = columns or max(1, len(prompts))
    parts = [slice(first, first + step) for first in range(0, max(1, len(prompts)), step)]
    bands = [
        _draw_sheet(
            [SheetRow(row.label, row.clips[part]) for row in rows],
            prompts[part],
            lambda n: spread_frames(n, frames_shown),
            frame_side,
        )
        for part in parts
    ]
    width = max(band.shape[1] for band in bands)
    padded = [
        np.pad(band, ((0, 0), (0, width - band.shape[1]), (0, 0)), constant_values=PAPER[0])
        for band in bands
    ]
    return np.concatenate(padded)


def write_sheet_mp4(
    rows: Sequence[SheetRow],
    prompts: Sequence[str],
    path: Path | str,
    *,
    fps: float = 8,
    repeats: int = 4,
    frame_side: int = 160,
    title: str | None = None,
) -> None:
    """Write the contact sheet in motion: every cell plays its clip ``repeats`` times. Same errors.

    Clips of several lengths are shown for as long as the shortest.

    Args:
        title: above all of it.
    """
    film = draw_sheet_film(rows, prompts, frame_side=frame_side, title=title)
    write_mp4(np.concatenate([film] * repeats), path, fps=fps, smallest_side=1)


def write_sheet_gif(
    rows: Sequence[SheetRow],
    prompts: Sequence[str],
    path: Path | str,
    *,
    fps: float = 8,
    frame_side: int = 160,
) -> None:
    """Write the contact sheet in motion as a GIF that repeats without end. Same errors."""
    film = draw_sheet_film(rows, prompts, frame_side=frame_side)
    with replace_file(path) as staging:
        staging.write_bytes(encode_animation(film, "GIF", fps))


def draw_sheet_film(
    rows: Sequence[SheetRow],
    prompts: Sequence[str],
    *,
    frame_side: int = 160,
    title: str | None = None,
) -> np.ndarray:
    """Draw the contact sheet in motion, [T, H, W, 3] uint8: a page for each frame of the shortest
    clips. Arguments and errors are those of ``write_sheet_mp4``."""
    count = min((row.clips.shape[1] for row in rows), default=0)
    pages = [
        _draw_sheet(rows, prompts, lambda _, now=now: [now], frame_side) for now in range(count)
    ]
    if not pages:
        raise _nothing_to_draw(rows, prompts)
    film = np.stack(pages)
    return film if title is None else caption_clips(film[None], [title])[0]


def _draw_sheet(
    rows: Sequence[SheetRow],
    prompts: Sequence[str],
    picks: Callable[[int], Sequence[int]],
    frame_side: int,
) -> np.ndarray:
    """Draw the frames that ``picks`` names of a clip of so many, of all clips."""
    if not rows or not prompts:
        raise _nothing_to_draw(rows, prompts)
    cells = [_row_of_cells(row, len(prompts), picks, frame_side) for row in rows]
    width = max(row[0].shape[1] for row in cells)
    letters = Lettering(_FONT_SIZE)
    labels = [printable(row.label).split("\n") for row in rows]
    captions = [letters.wrap(prompt, width) for prompt in prompts]
    left = 2 * _GAP + max(letters.length(line) for lines in labels for line in lines)
    top = _GAP + _LINE * max(len(lines) for lines in captions) + _GAP // 2
    height = top + sum(row[0].shape[0] + _GAP for row in cells)
    sheet = Image.new("RGB", (left + (width + _GAP) * len(prompts), height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, lines in enumerate(captions):
        for number, text in enumerate(lines):
            place = (left + column * (width + _GAP), _GAP + number * _LINE)
            letters.draw(pen, place, text, INK)
    for label, drawn in zip(labels, cells, strict=True):
        for number, text in enumerate(label):
            letters.draw(pen, (_GAP, top + 4 + number * _LINE), text, INK)
        for column, cell in enumerate(drawn):
            sheet.paste(Image.fromarray(cell), (left + column * (width + _GAP), top))
        top += drawn[0].shape[0] + _GAP
    return np.asarray(sheet)


def _nothing_to_draw(rows: Sequence[SheetRow], prompts: Sequence[str]) -> ValueError:
    return ValueError(
        f"a contact sheet of {len(rows)} rows and {len(prompts)} prompts: both must be at least "
        "1, or there is nothing to draw; pass one SheetRow a model and the prompts that they were "
        "sampled with."
    )


def _row_of_cells(
    row: SheetRow, count: int, picks: Callable[[int], Sequence[int]], frame_side: int
) -> list[np.ndarray]:
    """Draw a picture [h, w, 3] of each clip."""
    _check_row(row, count)
    chosen = list(picks(row.clips.shape[1]))
    return [frames_in_line(check_clip(clip)[chosen], frame_side) for clip in row.clips]


def _check_row(row: SheetRow, count: int) -> None:
    if row.clips.ndim != 5 or row.clips.shape[0] != count:
        raise ValueError(
            f"row {row.label!r}: clips of shape {row.clips.shape} for {count} prompts; [N, T, H, "
            "W, 3] with one clip a prompt is needed, because a column shows one prompt for every "
            "row; sample each prompt once a row."
        )


def spread_frames(frames: int, shown: int) -> list[int]:
    """Return the numbers of at most ``shown`` of ``frames`` frames, from the first to the last."""
    return np.linspace(0, frames - 1, min(shown, frames)).round().astype(int).tolist()


def frames_in_line(frames: np.ndarray, frame_side: int) -> np.ndarray:
    """Draw frames [T, H, W, 3] side by side, enlarged, with a thin line of paper between them."""
    large = enlarge(frames, frame_side)
    line = np.full((large.shape[1], 2, 3), PAPER, np.uint8)
    parts = [part for frame in large for part in (frame, line)][:-1]
    return np.concatenate(parts, axis=1)


def caption_clips(clips: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Put a caption above each clip of [N, T, H, W, 3] uint8, on paper; all become as high as the
    longest caption needs: [N, T, H + h, W, 3].
    """
    size = 14
    width = clips.shape[3]
    letters = Lettering(size)
    lines = [letters.wrap(caption, width - 8) for caption in captions]
    height = 8 + (size + 4) * max(map(len, lines))
    bands = []
    for own in lines:
        band = Image.new("RGB", (width, height), PAPER)
        for number, text in enumerate(own):
            letters.draw(ImageDraw.Draw(band), (4, 4 + number * (size + 4)), text, INK)
        bands.append(np.asarray(band))
    shape = (*clips.shape[:2], height, width, 3)
    return np.concatenate([np.broadcast_to(np.stack(bands)[:, None], shape), clips], axis=2)
