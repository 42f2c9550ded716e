"""One sample as a preview shows it."""

from __future__ import annotations

import numpy as np
from attrs import frozen


@frozen(kw_only=True, eq=False)
class Shown:
    """One sample of a preview.

    Attributes:
        source: [F, H, W, 3] uint8, as the VAE is given it.
        decoded: the same through the VAE and back.
        psnr: in dB, of the whole clip.
        notes: what a person should know, each continuing "it ...".
    """

    id: str
    caption: str
    shape: str
    source: np.ndarray
    decoded: np.ndarray
    psnr: float
    notes: tuple[str, ...]
