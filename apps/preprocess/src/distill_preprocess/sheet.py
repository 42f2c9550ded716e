"""The contact sheet of a preview: a row for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from distill_media import Lettering, scale_to_height
from distill_runtime import printable, replace_file
from PIL import Image, ImageDraw

from distill_preprocess.shown import Shown

_SIDE, _GAP, _LINE, _FRAMES = 120, 10, 22, 3
_INK, _PAPER, _NOTE = (20, 20, 20), (250, 250, 250), (180, 83, 9)
_FONT, _WIDTH = 16, 640
"""Size of letters, and pixels of a line of a caption."""
_COLUMNS = 78
"""Letters of an id or a note."""


def write_sheet(path: Path, shown: Sequence[Shown]) -> None:
    """Draw frames of each source above the same frames through the VAE, and what is said of it."""
    rows = [_row(sample) for sample in shown]
    size = (max(row.width for row in rows), sum(row.height for row in rows))
    sheet = Image.new("RGB", size, _PAPER)
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    with replace_file(path) as part:
        sheet.save(part)


def _row(sample: Shown) -> Image.Image:
    numbers = np.linspace(0, len(sample.source) - 1, min(_FRAMES, len(sample.source)))
    strips = [
        np.concatenate([scale_to_height(frames[round(n)], _SIDE) for n in numbers], axis=1)
        for frames in (sample.source, sample.decoded)
    ]
    height, width = strips[0].shape[:2]
    letters = Lettering(_FONT)
    lines = [
        (printable(sample.id, one_line=True)[:_COLUMNS], _INK),
        (f"{sample.shape}, {sample.psnr:.1f} dB", _INK),
        *((line, _INK) for line in letters.wrap(sample.caption, _WIDTH)[:4]),
        *((printable(note, one_line=True)[:_COLUMNS], _NOTE) for note in sample.notes),
    ]
    text = max(letters.length(line) for line, _ in lines)
    rows = max(2 * height + _GAP, _LINE * len(lines))
    size = (width + 3 * _GAP + text, rows + 2 * _GAP)
    row = Image.new("RGB", size, _PAPER)
    for number, strip in enumerate(strips):
        row.paste(Image.fromarray(strip), (_GAP, _GAP + number * (height + _GAP // 2)))
    pen = ImageDraw.Draw(row)
    for number, (line, color) in enumerate(lines):
        letters.draw(pen, (width + 2 * _GAP, _GAP + number * _LINE), line, color)
    return row
