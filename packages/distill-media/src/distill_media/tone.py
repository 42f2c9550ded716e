"""From HDR to SDR: the light that PQ and HLG codes stand for, and what an SDR screen shows of it.
Numbers alone.

Light is in nits (cd/m^2). A picture of ``REFERENCE_WHITE`` at most stays nearly as it is; what is
brighter is rolled off below the white of SDR instead of cut off.
"""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np

Transfer = Literal["PQ", "HLG"]

REFERENCE_WHITE = 203.0
"""Nits of a white sheet in HDR (ITU-R BT.2408), which becomes about the white of SDR."""
PEAK = 1000.0
"""Nits of the brightest highlight that is kept apart from others; usual for masters, and HLG's."""

_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
_A, _B, _C = 0.17883277, 0.28466892, 0.55991073
_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)
_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)


def pq_to_nits(code: np.ndarray) -> np.ndarray:
    """Return the light of codes in [0, 1]; the EOTF of SMPTE ST 2084 (ITU-R BT.2100, table 4)."""
    power = np.clip(code, 0, 1) ** (1 / _M2)
    return 10_000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)


def nits_to_pq(nits: np.ndarray) -> np.ndarray:
    """Return the codes of light: the inverse of ``pq_to_nits``."""
    power = (np.clip(nits, 0, 10_000) / 10_000) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2


def hlg_to_scene(code: np.ndarray) -> np.ndarray:
    """Return the light of the scene in [0, 1]; the inverse OETF of ARIB STD-B67 (ITU-R BT.2100,
    table 5)."""
    code = np.clip(code, 0, 1)
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - _C) / _A) + _B) / 12)


def scene_to_nits(scene: np.ndarray) -> np.ndarray:
    """Return what a screen of ``PEAK`` shows of the light of a scene [..., 3]: the OOTF of ITU-R
    BT.2100, table 5, with the system gamma 1.2 of 1,000 nits."""
    return PEAK * (scene @ _LUMINANCE)[..., None] ** 0.2 * scene


def roll_off(nits: np.ndarray) -> np.ndarray:
    """Bring light of up to ``PEAK`` to at most ``REFERENCE_WHITE``; dark and middle tones stay.

    The EETF of ITU-R BT.2390, section 5.4, in PQ codes relative to ``PEAK``.
    """
    peak, white = nits_to_pq(np.array([PEAK, REFERENCE_WHITE]))
    code, most = np.minimum(nits_to_pq(nits) / peak, 1), white / peak
    knee = 1.5 * most - 0.5
    t = np.clip((code - knee) / (1 - knee), 0, 1)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (3 * t**2 - 2 * t**3) * most
    )
    return pq_to_nits(np.where(code < knee, code, spline) * peak)


def to_sdr(pixels: np.ndarray, transfer: Transfer, *, wide: bool) -> np.ndarray:
    """Return SDR pixels [H, W, 3] uint8 of HDR ones [H, W, 3] uint16.

    All of a pixel's primaries are scaled alike, by its largest, so that hues stay; what BT.709 has
    no colour for is cut off.

    Args:
        wide: the primaries are those of BT.2020, and not BT.709's (matrix: ITU-R BT.2087).
    """
    light = _build_light_table(transfer)[pixels]
    if transfer == "HLG":
        light = scene_to_nits(light)
    largest = np.maximum(light.max(axis=-1, keepdims=True), 1e-6)
    light *= _build_roll_off_table()[_number_light(largest / PEAK)] / largest
    if wide:
        light = light @ _TO_BT709.T
    return _build_sdr_table()[_number_light(light / REFERENCE_WHITE)]


# -- tables, as each of these formulas has a power or two for every value of a clip ----------------


def _number_light(light: np.ndarray) -> np.ndarray:
    """Number light in [0, 1] by its root, so that dark tones have as many numbers as they need."""
    return np.round(np.sqrt(np.clip(light, 0, 1)) * _LAST).astype(np.uint16)


_LAST = 65_535


@functools.cache
def _build_light_table(transfer: Transfer) -> np.ndarray:
    code = np.arange(_LAST + 1) / _LAST
    return (pq_to_nits(code) if transfer == "PQ" else hlg_to_scene(code)).astype(np.float32)


@functools.cache
def _build_roll_off_table() -> np.ndarray:
    """``roll_off`` of light, by ``_number_light`` of it relative to ``PEAK``."""
    return roll_off((np.arange(_LAST + 1) / _LAST) ** 2 * PEAK).astype(np.float32)


@functools.cache
def _build_sdr_table() -> np.ndarray:
    """SDR pixels by ``_number_light``; the inverse of ITU-R BT.1886, as screens have."""
    light = (np.arange(_LAST + 1) / _LAST) ** 2
    return np.round(255 * light ** (1 / 2.4)).astype(np.uint8)
