"""From an item to its clips: cut, resampled, scaled and cropped to a bucket."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from attrs import frozen

from distill_media.buckets import ClipShape, NoBucketError, choose_bucket, frame_for
from distill_media.config import CutConfig
from distill_media.errors import MediaError
from distill_media.items import MediaItem, MediaPlace
from distill_media.pictures import frame_picture, read_picture
from distill_media.timing import find_gaps, frame_numbers, frames_in, split_scenes, starts
from distill_media.video import VideoError, VideoInfo, read_frames, read_info


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


def read_clips(
    item: MediaItem,
    buckets: Sequence[ClipShape],
    cut: CutConfig,
    *,
    scene_cuts: Mapping[str, Sequence[float]] | None = None,
    threads: int = 1,
) -> Iterator[MediaClip]:
    """Yield the clips of ``item``, decoding each when it is asked for.

    Args:
        scene_cuts: seconds by the item's id.
        threads: of the decoder.

    Raises:
        MediaError: with the item's id and the reason. A video that is damaged in its middle may
            have given clips before.
    """
    if item.problem is not None:
        raise MediaError(item.id, item.problem)
    if item.place is None:
        raise MediaError(item.id, "it is a prompt without a clip")
    try:
        if item.place.is_picture:
            yield _picture(item, item.place, buckets, cut)
        else:
            cuts = (scene_cuts or {}).get(item.id, ())
            yield from _videos(item, item.place, buckets, cut, cuts, threads)
    except (VideoError, NoBucketError) as error:
        raise MediaError(item.id, str(error)) from error
    except OSError as error:
        raise MediaError(item.id, f"it cannot be read ({error.strerror or error})") from error


def _picture(
    item: MediaItem, place: MediaPlace, buckets: Sequence[ClipShape], cut: CutConfig
) -> MediaClip:
    pixels, notes = read_picture(place, cut.max_pixels)
    height, width = pixels.shape[:2]
    shape = choose_bucket(1, height, width, buckets, upscale=cut.upscale)
    framing = frame_for(shape, height, width, crop=cut.crop, seed=cut.seed, name=item.id)
    return MediaClip(id=item.id, shape=shape, frames=frame_picture(pixels, framing), notes=notes)


@frozen
class _Window:
    """Frames of a video that make one clip."""

    shape: ClipShape
    numbers: list[int]


def _videos(
    item: MediaItem,
    place: MediaPlace,
    buckets: Sequence[ClipShape],
    cut: CutConfig,
    cuts: Sequence[float],
    threads: int,
) -> Iterator[MediaClip]:
    info = read_info(place, cut.max_pixels)
    for count, window in enumerate(_windows(item, info, buckets, cut, cuts)):
        name = item.id if count == 0 else f"{item.id}#{count + 1}"
        framing = frame_for(
            window.shape, info.height, info.width, crop=cut.crop, seed=cut.seed, name=name
        )
        frames = read_frames(
            place, info, window.numbers, framing, max_pixels=cut.max_pixels, threads=threads
        )
        yield MediaClip(
            id=name,
            shape=window.shape,
            frames=frames,
            start=info.timeline.times[window.numbers[0]],
            notes=info.notes,
        )


def _windows(
    item: MediaItem,
    info: VideoInfo,
    buckets: Sequence[ClipShape],
    cut: CutConfig,
    cuts: Sequence[float],
) -> list[_Window]:
    """Choose the clips of a video; scenes that are too short for every bucket give none.

    Raises:
        NoBucketError: no scene is long and large enough.
    """
    gaps = find_gaps(info.timeline)
    scenes = split_scenes(info.timeline.duration, item.segment, [*cuts, *gaps])
    if not scenes:
        raise VideoError(
            f"its part from {item.segment} lies behind its end at {info.timeline.duration:.4g} s. "
            "Correct start and end"
        )
    counts = [frames_in(scene, info.timeline, cut.fps) for scene in scenes]
    windows: list[_Window] = []
    for scene, available in zip(scenes, counts, strict=True):
        try:
            shape = choose_bucket(available, info.height, info.width, buckets, upscale=cut.upscale)
        except NoBucketError:
            continue
        for start in starts(available, shape.frames, cut):
            numbers = frame_numbers(scene, info.timeline, cut.fps, start, shape.frames)
            windows.append(_Window(shape, numbers))
    if not windows:
        choose_bucket(max(counts), info.height, info.width, buckets, upscale=cut.upscale)
    return windows[:1] if cut.take == "head" else windows[: cut.count]
