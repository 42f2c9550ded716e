"""From an item to its clips: cut, resampled, scaled and cropped to a bucket."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from attrs import frozen

from distill_media.buckets import (
    NO_BARS,
    Bars,
    ClipShape,
    Framing,
    NoBucketError,
    choose_bucket,
    frame_for,
)
from distill_media.config import CutConfig
from distill_media.errors import MediaError
from distill_media.inspection import find_bars
from distill_media.items import MediaItem, MediaPlace
from distill_media.pictures import frame_picture, read_picture, read_picture_size
from distill_media.timing import find_gaps, frame_numbers, frames_in, split_scenes, starts
from distill_media.video import VideoError, VideoInfo, Wanted, read_frames, read_info

_BAR_FRAMES = 9
CLIPS_A_PASS = 4
"""That are decoded together, and so in memory together."""


@frozen(kw_only=True, eq=False)
class MediaClip:
    """A clip of a bucket's shape.

    Attributes:
        id: the item's; with ``#2`` and so on where an item gives several.
        frames: [F, H, W, 3] uint8, RGB.
        start: seconds from the beginning of the video.
        notes: what a person should know, each continuing "it ...".
    """

    id: str
    shape: ClipShape
    frames: np.ndarray
    start: float = 0.0
    notes: tuple[str, ...] = ()


@frozen(kw_only=True, eq=False)
class PlannedClip:
    """A clip that is known, and not decoded yet.

    Attributes:
        numbers: of the video's frames that make it; of a picture none.
        info: None of a picture.
        bars: that are cut off.
    """

    item: MediaItem
    place: MediaPlace
    id: str
    shape: ClipShape
    numbers: tuple[int, ...] = ()
    info: VideoInfo | None = None
    bars: Bars = NO_BARS


def read_clips(
    item: MediaItem,
    buckets: Sequence[ClipShape],
    cut: CutConfig,
    *,
    scene_cuts: Mapping[str, Sequence[float]] | None = None,
) -> Iterator[MediaClip]:
    """Yield the clips of ``item``, decoding each when it is asked for.

    Args:
        scene_cuts: seconds by the item's id.

    Raises:
        MediaError: with the item's id and the reason. A video that is damaged in its middle may
            have given clips before.
    """
    planned = plan_clips(item, buckets, cut, scene_cuts=scene_cuts)
    for group in group_clips(planned):
        yield from decode_clips(group, cut)


def plan_clips(
    item: MediaItem,
    buckets: Sequence[ClipShape],
    cut: CutConfig,
    *,
    scene_cuts: Mapping[str, Sequence[float]] | None = None,
) -> list[PlannedClip]:
    """Choose the clips of ``item`` by its frames' times and size: one, or more.

    Raises:
        MediaError: as ``read_clips``.
    """
    if item.problem is not None:
        raise MediaError(item.id, item.problem)
    if item.place is None:
        raise MediaError(item.id, "it is a prompt without a clip")
    with _naming(item.id):
        if item.place.is_picture:
            height, width = read_picture_size(item.place, cut.max_pixels)
            bars = NO_BARS
            if cut.crop_bars:
                bars = find_bars(read_picture(item.place, cut.max_pixels)[0].max(axis=2))
            size = (height * bars.height, width * bars.width)
            shape = choose_bucket(1, *size, buckets, upscale=cut.upscale)
            return [PlannedClip(item=item, place=item.place, id=item.id, shape=shape, bars=bars)]
        info = read_info(item.place, cut.max_pixels)
        bars = _bars_of(item, item.place, info, cut) if cut.crop_bars else NO_BARS
        cuts = (scene_cuts or {}).get(item.id, ())
        return [
            PlannedClip(
                item=item,
                place=item.place,
                id=item.id if count == 0 else f"{item.id}#{count + 1}",
                shape=shape,
                numbers=tuple(numbers),
                info=info,
                bars=bars,
            )
            for count, (shape, numbers) in enumerate(_windows(item, info, bars, buckets, cut, cuts))
        ]


def group_clips(planned: Sequence[PlannedClip]) -> list[list[PlannedClip]]:
    """Divide the clips of an item into groups that are decoded in one pass each.

    Decoding begins at a key frame, which may be hundreds of frames before a clip.
    """
    return [list(planned[i : i + CLIPS_A_PASS]) for i in range(0, len(planned), CLIPS_A_PASS)]


def decode_clips(
    planned: Sequence[PlannedClip], cut: CutConfig, *, threads: int = 1
) -> list[MediaClip]:
    """Decode clips of one item in one pass.

    Args:
        threads: of the decoder.

    Raises:
        MediaError: as ``read_clips``.
    """
    first = planned[0]
    with _naming(first.item.id):
        if first.info is None:
            pixels, notes = read_picture(first.place, cut.max_pixels)
            frames = frame_picture(pixels, _framing(first, pixels.shape[0], pixels.shape[1], cut))
            notes = (*notes, *_said_of(first.bars))
            return [MediaClip(id=first.id, shape=first.shape, frames=frames, notes=notes)]
        info = first.info
        wanted = [
            Wanted(clip.numbers, _framing(clip, info.height, info.width, cut)) for clip in planned
        ]
        results = read_frames(first.place, info, wanted, max_pixels=cut.max_pixels, threads=threads)
    return [
        MediaClip(
            id=clip.id,
            shape=clip.shape,
            frames=frames,
            start=info.timeline.times[clip.numbers[0]],
            notes=(*info.notes, *_said_of(clip.bars)),
        )
        for clip, frames in zip(planned, results, strict=True)
    ]


def read_last_frames(path: Path, count: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read the last frames of a video, as they are stored and not at another rate.

    Args:
        size: (height, width) that they are scaled and cropped to, about their middle; None: that of
            the video.

    Returns:
        [count, H, W, 3] uint8, RGB.

    Raises:
        MediaError: it cannot be read, or is shorter.
    """
    place, most = MediaPlace(path, path.name), CutConfig().max_pixels
    with _naming(str(path)):
        info = read_info(place, most)
        if len(info.numbers) < count:
            raise VideoError(
                f"it has {len(info.numbers)} frames, and the last {count} are asked for. Use a "
                "longer video, or ask for fewer"
            )
        height, width = size or (round(info.height), round(info.width))
        shape = ClipShape(count, height, width)
        framing = frame_for(shape, info.height, info.width, crop="center", seed=0, name=path.name)
        places = range(len(info.numbers) - count, len(info.numbers))
        [frames] = read_frames(place, info, [Wanted(places, framing)], max_pixels=most)
    return frames


def _framing(clip: PlannedClip, height: float, width: float, cut: CutConfig) -> Framing:
    return frame_for(
        clip.shape, height, width, crop=cut.crop, seed=cut.seed, name=clip.id, bars=clip.bars
    )


def _bars_of(item: MediaItem, place: MediaPlace, info: VideoInfo, cut: CutConfig) -> Bars:
    """Find the bars of a video, in frames of the part of it that the item speaks of."""
    times = np.array(info.timeline.times)
    start, end = item.segment or (0.0, info.timeline.duration)
    [inside] = np.nonzero((times >= start) & (times < end))
    if not inside.size:
        return NO_BARS  # what is wrong with the segment is said where clips are chosen
    chosen = inside[
        np.linspace(0, len(inside) - 1, min(_BAR_FRAMES, len(inside))).round().astype(int)
    ]
    height, width = round(info.height), round(info.width)
    whole = Framing(height, width, 0, 0, height, width)
    brightest = np.zeros((height, width), np.uint8)
    for number in map(int, chosen):  # one at a time, as frames of 4K are 25 MB each
        [[frame]] = read_frames(place, info, [Wanted([number], whole)], max_pixels=cut.max_pixels)
        brightest = np.maximum(brightest, frame.max(axis=2))
    return find_bars(brightest)


def _said_of(bars: Bars) -> list[str]:
    if bars == NO_BARS:
        return []
    rest = f"{100 * bars.height:.0f} % of its height and {100 * bars.width:.0f} % of its width"
    return [f"had black bars, which were cut off ({rest} are left)"]


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Give reasons the name of the item or file."""
    try:
        yield
    except (VideoError, NoBucketError) as error:
        raise MediaError(name, str(error)) from error
    except OSError as error:
        raise MediaError(name, f"it cannot be read ({error.strerror or error})") from error


def _windows(
    item: MediaItem,
    info: VideoInfo,
    bars: Bars,
    buckets: Sequence[ClipShape],
    cut: CutConfig,
    cuts: Sequence[float],
) -> list[tuple[ClipShape, list[int]]]:
    """Choose the clips of a video, each by its shape and the numbers of its frames.

    Scenes that are too short for every bucket give none.

    Raises:
        NoBucketError: no scene is long and large enough.
    """
    height, width = info.height * bars.height, info.width * bars.width
    gaps = find_gaps(info.timeline)
    scenes = split_scenes(info.timeline.duration, item.segment, [*cuts, *gaps])
    if not scenes:
        raise VideoError(
            f"its part from {item.segment} lies behind its end at {info.timeline.duration:.4g} s. "
            "Correct start and end"
        )
    counts = [frames_in(scene, info.timeline, cut.fps) for scene in scenes]
    windows: list[tuple[ClipShape, list[int]]] = []
    for scene, available in zip(scenes, counts, strict=True):
        try:
            shape = choose_bucket(available, height, width, buckets, upscale=cut.upscale)
        except NoBucketError:
            continue
        for start in starts(available, shape.frames, cut):
            numbers = frame_numbers(scene, info.timeline, cut.fps, start, shape.frames)
            windows.append((shape, numbers))
    if not windows:
        choose_bucket(max(counts), height, width, buckets, upscale=cut.upscale)
    return windows[:1] if cut.take == "head" else windows[: cut.count]
