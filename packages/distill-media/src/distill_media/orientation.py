"""How a frame is turned and mirrored for display: the display matrix of a container."""

from __future__ import annotations

import struct

import numpy as np
from attrs import frozen

_MATRIX = struct.Struct("=9i")


@frozen
class Orientation:
    """Exchange rows and columns first, then mirror.

    Attributes:
        transposed: rows become columns.
        flip_rows: upside down; ``flip_columns``: left to right.
        exact: False: the matrix asks for another angle than quarter turns, which is left undone.
    """

    transposed: bool = False
    flip_rows: bool = False
    flip_columns: bool = False
    exact: bool = True

    def apply(self, frame: np.ndarray) -> np.ndarray:
        """Turn a frame, or one color of it, [H, W, ...] upright; a view."""
        if self.transposed:
            frame = frame.swapaxes(0, 1)
        return frame[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


UPRIGHT = Orientation()


def read_matrix(content: bytes) -> Orientation:
    """Read a display matrix (a b u, c d v, x y w; 16.16 fixed point): a pixel (p, q) is shown at
    (a p + c q, b p + d q)."""
    if len(content) < _MATRIX.size:
        return UPRIGHT
    a, b, _, c, d, *_ = _MATRIX.unpack_from(content)
    largest = max(map(abs, (a, b, c, d)))
    # A 1000th of the scale: matrices are written with rounding.
    straight, turned = (max(map(abs, off)) * 1000 <= largest for off in ((b, c), (a, d)))
    if largest == 0 or straight == turned:
        return Orientation(exact=False)
    if straight:
        return Orientation(flip_rows=d < 0, flip_columns=a < 0)
    return Orientation(transposed=True, flip_rows=b < 0, flip_columns=c < 0)
