"""What a person would see at once in a clip, and nobody sees in a folder of a million.

Thresholds are for 8-bit RGB; they were chosen to be silent on ordinary clips, so what is found is
worth a look and nothing more.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from distill_media.buckets import Bars

STATIC = 0.5
"""Mean change of a pixel between neighbouring frames, of 255."""
BLACK = 16
"""Brightness up to which a pixel is black; video black is 16 in limited range."""
CUT_CHANGE, CUT_RATIO = 35.0, 6.0
"""A cut changes the mean pixel by this much, and this many times as much as the median change."""
BAR_SHARE = 0.04
"""Of the rows (or columns): narrower bars are often a border of the encoder."""


def find_notes(frames: np.ndarray) -> Iterator[str]:
    """Yield what is odd about a clip [F, H, W, 3] uint8; each continues "it ..."."""
    small = frames[:, :: _step(frames.shape[1]), :: _step(frames.shape[2])].copy()
    brightness = np.maximum(np.maximum(small[..., 0], small[..., 1]), small[..., 2])
    black = (brightness <= BLACK).mean(axis=(1, 2)) > 0.99
    if black.all():
        yield "is black"
        return
    if black.any():
        yield f"has black frames ({int(black.sum())} of {len(frames)})"
    rows, columns = (sum(_bars(brightness.max(axis=axis))) for axis in ((0, 2), (0, 1)))
    if max(rows, columns) >= BAR_SHARE:
        where = "above and below" if rows >= columns else "at the sides"
        share = f"{100 * max(rows, columns):.0f} % of the frame"
        yield f"has black bars {where} ({share}); crop_bars cuts them off"
    if len(frames) < 2:
        return
    early, late = small[:-1], small[1:]
    change = (np.maximum(early, late) - np.minimum(early, late)).mean(axis=(1, 2, 3))
    if change.max() < STATIC:
        yield "does not move"
    usual = float(np.median(change))
    for place in np.flatnonzero((change > CUT_CHANGE) & (change > CUT_RATIO * usual)):
        yield f"cuts to another scene at frame {int(place) + 1}"


def _step(size: int) -> int:
    return max(1, size // 120)


def find_bars(brightest: np.ndarray, blur: int = 2) -> Bars:
    """Find black bars above and below, or at both sides.

    Args:
        brightest: [H, W] uint8, the largest value that each pixel has in any frame and channel, so
            that what is black only for a while is none.
        blur: rows or columns beside a bar that are cut off with it, as scaling and compression mix
            them with it.
    """
    ends = []
    for line in (brightest.max(axis=1), brightest.max(axis=0)):
        black = _bars(line)
        more = blur / len(line)
        ends += [end + more for end in black] if sum(black) >= BAR_SHARE else [0.0, 0.0]
    top, bottom, left, right = ends
    return Bars(top=top, bottom=bottom, left=left, right=right)


def _bars(line: np.ndarray) -> tuple[float, float]:
    """Return the shares of a line that are black at its ends, if both are."""
    light = np.flatnonzero(line > BLACK)
    if not light.size or light[0] == 0 or light[-1] == len(line) - 1:
        return 0.0, 0.0
    return float(light[0]) / len(line), float(len(line) - 1 - light[-1]) / len(line)
