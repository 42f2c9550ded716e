"""HDR becomes SDR: exact in dark and middle tones, bounded above, with its hues."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from distill_media import ClipShape, CutConfig, MediaClip, MediaItem, MediaPlace, read_clips
from distill_media.tone import (
    PEAK,
    REFERENCE_WHITE,
    hlg_to_scene,
    nits_to_pq,
    pq_to_nits,
    roll_off,
    scene_to_nits,
    to_sdr,
)
from hypothesis import given
from hypothesis import strategies as st

PQ, HLG, WIDE, UNNAMED = 16, 18, 9, 2
"""Transfers and primaries as ITU-T H.273 numbers them."""
COLOURS = [(150, 40, 40), (40, 150, 40), (40, 40, 150), (120, 120, 120)]
TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])


def test_published_points_of_the_curves():
    # ITU-R BT.2408, table 1: PQ 58 % is 203 nits; HLG 75 % is 203 nits on a screen of 1,000.
    assert pq_to_nits(np.array(0.5807)) == pytest.approx(203, rel=2e-3)
    assert pq_to_nits(np.array([0.0, 1.0])) == pytest.approx([0, 10_000])
    scene = hlg_to_scene(np.full(3, 0.75))
    assert scene_to_nits(scene) == pytest.approx(203, rel=2e-3)
    assert scene_to_nits(hlg_to_scene(np.ones(3))) == pytest.approx(PEAK, rel=1e-3)


@given(st.floats(0, 10_000))
def test_codes_and_light_are_each_others_inverse(nits):
    assert pq_to_nits(nits_to_pq(np.array(nits))) == pytest.approx(nits, rel=1e-6, abs=1e-6)


@given(st.lists(st.floats(0, 10_000), min_size=2, max_size=2))
def test_the_roll_off_rises_and_never_exceeds_white(pair):
    low, high = roll_off(np.array(sorted(pair)))
    assert low <= high + 1e-6
    assert high <= REFERENCE_WHITE * (1 + 1e-6)
    assert roll_off(np.array(min(pair[0], 80.0))) == pytest.approx(min(pair[0], 80.0), rel=1e-6)


def sdr_light(pixels: np.ndarray) -> np.ndarray:
    return REFERENCE_WHITE * (pixels / 255) ** 2.4


def to_codes(nits: np.ndarray) -> np.ndarray:
    return np.round(nits_to_pq(nits) * 65535).astype(np.uint16)


@given(st.lists(st.integers(0, 178), min_size=3, max_size=3))
def test_sdr_that_was_brought_to_pq_comes_back(colour):
    pixel = np.array(colour, np.uint8)[None, None]
    back = to_sdr(to_codes(sdr_light(pixel) @ TO_BT2020.T), "PQ", wide=True)
    assert np.abs(back.astype(int) - pixel).max() <= 6 - 5 * (max(colour) == min(colour))


@pytest.mark.parametrize("transfer", ["PQ", "HLG"])
def test_greys_stay_grey_and_rise(transfer):
    codes = np.linspace(0, 65535, 257).astype(np.uint16)
    grey = to_sdr(np.repeat(codes[None, :, None], 3, axis=2), transfer, wide=True)[0].astype(int)
    assert (np.ptp(grey, axis=1) <= 1).all()
    assert (np.diff(grey[:, 1]) >= 0).all()
    assert grey[0, 1] == 0
    assert grey[-1, 1] == 255


def write_hdr(path: Path, codes: np.ndarray, transfer: int, named: int = WIDE) -> Path:
    """Write frames [F, H, W, 3] uint16 of BT.2020 with ten bits, as a phone does, that name their
    primaries and matrix or not."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height, stream.width = codes.shape[1:3]
        stream.pix_fmt = "yuv444p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = transfer, named, named
        for pixels in codes:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb48le")
            frame = frame.reformat(format="yuv444p10le", dst_colorspace=WIDE, dst_color_range=1)
            frame.color_trc, frame.color_primaries, frame.colorspace = transfer, named, named
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read(path: Path) -> MediaClip:
    item = MediaItem(id=path.name, place=MediaPlace(path, path.name))
    [clip] = read_clips(item, [ClipShape(3, 32, 32)], CutConfig())
    return clip


@pytest.mark.parametrize("named", [WIDE, UNNAMED])
def test_a_video_of_pq_has_the_colours_of_sdr_and_says_so(tmp_path, named):
    picture = np.repeat(np.repeat(np.array(COLOURS).reshape(2, 2, 3), 16, 0), 16, 1)
    codes = to_codes(sdr_light(picture) @ TO_BT2020.T)
    clip = read(write_hdr(tmp_path / "a.mkv", np.stack([codes] * 3), PQ, named))
    assert clip.notes == ("is HDR (PQ); its tones are mapped to SDR",)
    found = [clip.frames[1, row, column] for row in (8, 24) for column in (8, 24)]
    assert np.abs(np.array(found, int) - COLOURS).max() <= 6


def test_a_video_of_hlg_is_mapped_too(tmp_path):
    codes = np.full((3, 32, 32, 3), round(0.75 * 65535), np.uint16)
    clip = read(write_hdr(tmp_path / "a.mkv", codes, HLG))
    assert clip.notes == ("is HDR (HLG); its tones are mapped to SDR",)
    expected = to_sdr(codes[:1], "HLG", wide=True)[0, 0, 0]
    assert np.abs(clip.frames.astype(int) - expected).max() <= 2
