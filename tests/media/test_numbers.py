"""Times, buckets and crops: rules that hold for whatever video comes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from distill_media import ClipShape, CutConfig, NoBucketError, choose_bucket, find_notes
from distill_media.buckets import Bars, frame_for
from distill_media.timing import (
    Scene,
    Timeline,
    find_gaps,
    frame_numbers,
    frames_in,
    split_scenes,
    starts,
)
from hypothesis import example, given
from hypothesis import strategies as st
from media_files import moving_frames, numbered_frames

SHAPES = st.builds(
    ClipShape,
    st.integers(0, 20).map(lambda n: 4 * n + 1),
    st.integers(1, 60).map(lambda n: 16 * n),
    st.integers(1, 60).map(lambda n: 16 * n),
)
STEPS = st.lists(st.floats(0.005, 0.9), min_size=1, max_size=60)


def timeline_of(steps: list[float]) -> Timeline:
    times = np.concatenate([[0.0], np.cumsum(steps)])
    return Timeline(tuple(times[:-1].tolist()), float(times[-1]))


@given(
    st.lists(SHAPES, min_size=1, max_size=8),
    st.integers(1, 100), st.integers(16, 1200), st.integers(16, 1200),
)  # fmt: skip
@example([ClipShape(n, 32, 48) for n in (9, 81, 121, 49)], 100, 64, 96)
def test_a_bucket_is_never_longer_or_larger_than_the_video(shapes, frames, height, width):
    fitting = [s for s in shapes if s.frames <= frames and s.height <= height and s.width <= width]
    try:
        shape = choose_bucket(frames, height, width, shapes, upscale=False)
    except NoBucketError:
        assert not fitting
        return
    assert shape in fitting
    aspect = math.log(width / height)
    best = min(abs(math.log(s.width / s.height) - aspect) for s in fitting)
    assert abs(math.log(shape.width / shape.height) - aspect) <= best + 1e-5
    same = [s for s in fitting if s.width * shape.height == s.height * shape.width]
    assert shape.frames == max(s.frames for s in same)


@given(
    SHAPES, st.integers(64, 2000), st.integers(64, 2000), st.booleans(),
    st.lists(st.floats(0, 0.3), min_size=4, max_size=4),
)  # fmt: skip
def test_a_crop_shows_nothing_of_bars(shape, height, width, random, ends):
    bars = Bars(top=ends[0], bottom=ends[1], left=ends[2], right=ends[3])
    crop = "random" if random else "center"
    framing = frame_for(shape, height, width, crop=crop, seed=1, name="a", bars=bars)
    for start, size, scaled, before, after in (
        (framing.top, framing.height, framing.scaled_height, bars.top, bars.bottom),
        (framing.left, framing.width, framing.scaled_width, bars.left, bars.right),
    ):
        assert 0 <= start <= scaled - size
        assert start >= before * scaled - 2  # rounded
        assert start + size <= (1 - after) * scaled + 2


@given(SHAPES, st.floats(16, 4000), st.floats(16, 4000), st.integers(0, 9), st.booleans())
def test_a_crop_lies_within_a_frame_that_covers_it_without_distortion(
    shape, height, width, seed, random
):
    crop = "random" if random else "center"
    framing = frame_for(shape, height, width, crop=crop, seed=seed, name="a")
    assert 0 <= framing.top <= framing.scaled_height - shape.height
    assert 0 <= framing.left <= framing.scaled_width - shape.width
    # One of the two is filled exactly: nothing is scaled down more than it must be.
    assert framing.scaled_height == shape.height or framing.scaled_width == shape.width
    scales = (framing.scaled_height / height, framing.scaled_width / width)
    rounding = 0.5 / min(height, width)
    assert scales[0] == pytest.approx(scales[1], abs=2 * rounding)


CUTS = st.one_of(
    st.just(CutConfig()),
    st.builds(lambda n: CutConfig(take="uniform", count=n), st.integers(1, 9)),
    st.builds(
        lambda n, s: CutConfig(take="windows", count=n, stride=s),
        st.none() | st.integers(1, 9),
        st.none() | st.integers(1, 40),
    ),
)


@given(STEPS, CUTS, st.integers(1, 12), st.just("keep") | st.sampled_from([4.0, 16.0, 24.0, 60.0]))
def test_clips_stay_within_their_scene_and_never_go_back(steps, cut, length, fps):
    timeline = timeline_of(steps)
    middle = timeline.duration / 2
    for scene in split_scenes(timeline.duration, None, [middle]):
        begun = [i for i, t in enumerate(timeline.times) if scene.start <= t < scene.end]
        available = frames_in(scene, timeline, fps)
        assert available >= 1
        chosen = starts(available, length, cut)
        assert chosen == sorted(set(chosen))
        assert bool(chosen) == (available >= length)
        if cut.count is not None:
            assert len(chosen) <= cut.count
        for start in chosen:
            numbers = frame_numbers(scene, timeline, fps, start, length)
            assert len(numbers) == length
            assert numbers == sorted(numbers)
            assert 0 <= numbers[0] <= numbers[-1] < len(timeline.times)
            if begun:
                assert begun[0] - 1 <= numbers[0]
                assert numbers[-1] <= begun[-1]
            if fps == "keep":
                assert numbers == list(range(numbers[0], numbers[0] + length))


@pytest.mark.parametrize("fps", [8.0, 12.0, 16.0, 23.976, 24.0, 25.0, 29.97, 30.0, 60.0])
@pytest.mark.parametrize("clock", [1000, 90_000])
def test_the_same_rate_takes_each_frame_once_whatever_the_clock_rounds(fps, clock):
    times = tuple(round(n / fps * clock) / clock for n in range(200))
    timeline = Timeline(times, 200 / fps)
    scene = Scene(0.0, timeline.duration)
    assert frames_in(scene, timeline, fps) == 200
    assert frame_numbers(scene, timeline, fps, 0, 200) == list(range(200))
    assert frame_numbers(scene, timeline, fps / 2, 0, 100) == list(range(0, 200, 2))


def test_a_pause_is_a_gap_and_a_slow_rate_is_none():
    assert find_gaps(timeline_of([0.1] * 5 + [3.0] + [0.1] * 5)) == pytest.approx([3.5])
    assert find_gaps(timeline_of([2.0] * 5)) == []
    assert find_gaps(Timeline((0.0,), 1.0)) == []


@pytest.mark.parametrize(
    ("step", "gap", "found"),
    [(0.25, 2.5, True), (0.25, 2.25, False), (0.0625, 1.0, True), (0.0625, 0.9375, False)],
)
def test_a_gap_is_a_second_and_ten_usual_steps(step, gap, found):
    times = [0.0, step, 2 * step, 2 * step + gap, 3 * step + gap]
    assert find_gaps(Timeline(tuple(times), times[-1] + step)) == [times[3]] * found


def notes(frames: np.ndarray) -> list[str]:
    return list(find_notes(frames))


def test_what_is_odd_about_a_clip_is_found_and_nothing_else():
    moving = moving_frames(12)
    assert notes(moving) == []
    assert notes(np.repeat(moving[:1], 12, axis=0)) == ["does not move"]
    assert notes(np.zeros_like(moving)) == ["is black"]
    dark = moving.copy()
    dark[:2] = 0
    assert notes(dark)[0] == "has black frames (2 of 12)"
    bars = moving.copy()
    bars[:, :8] = bars[:, -8:] = 4
    cut = "; crop_bars cuts them off"
    assert notes(bars) == [f"has black bars above and below (25 % of the frame){cut}"]
    sides = moving.copy()
    sides[:, :, :6] = sides[:, :, -6:] = 0
    assert notes(sides) == [f"has black bars at the sides (12 % of the frame){cut}"]
    other = 255 - moving_frames(12, seed=9)
    assert notes(np.concatenate([moving[:7], other[:5]])) == ["cuts to another scene at frame 7"]
    assert notes(numbered_frames(8)) == []  # it grows brighter
    wild = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), np.uint8)
    assert notes(wild) == []  # every frame is another, and none is a cut
