"""Reading a video by PyAV: its frames' times first, then the frames that a clip is made of.

Only containers of ``FORMATS`` are opened. A playlist that calls itself ``.mp4`` would make the
library open whatever files and addresses stand in it.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import av
import av.error
import numpy as np
from attrs import frozen
from av.video.reformatter import Colorspace, Interpolation

from distill_media.buckets import Framing
from distill_media.items import MediaPlace
from distill_media.orientation import UPRIGHT, Orientation, read_matrix
from distill_media.timing import Timeline
from distill_media.tone import Transfer, to_sdr

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpeg", "mpegts", "asf", "flv", "gif",
    "mpegvideo", "h264", "hevc", "ogg",
)  # fmt: skip
MOST_FRAMES = 20_000_000
"""Of a video: two days at 120 a second."""
_HD_ROWS = 720
_SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_HDR: Mapping[int, Transfer] = {16: "PQ", 18: "HLG"}
_UNSPECIFIED, _BT2020 = 2, 9
"""Of matrix and primaries, in the numbers of ITU-T H.273."""


_RGB_PLANES, _ALPHA_PLANE = (2, 0, 1), 3
"""Of frames that are stored a plane a color: green, blue, red, alpha."""


class VideoError(ValueError):
    """A video cannot be used; the message states why, without its name."""


@frozen(kw_only=True)
class VideoInfo:
    """What is known of a video without decoding all of it.

    Attributes:
        numbers: of each frame the time stamp that the container gives it; or, where it gives none,
            its place.
        stamped: which of the two.
        height: as displayed; ``width`` likewise. Not whole where pixels are not square.
        orientation: from the stored frame to the displayed one.
        notes: what a person should know.
    """

    timeline: Timeline
    numbers: tuple[int, ...]
    stamped: bool
    height: float
    width: float
    orientation: Orientation = UPRIGHT
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def open_video(
    place: MediaPlace, max_pixels: int, threads: int = 1
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Enter with the container and its first video stream.

    Raises:
        VideoError: no video, or none that can be read; within the block too.
        OSError: the file cannot be opened.
    """
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file,crypto,data"}
    with place.open() as file, _explained():
        if not file.read(1):
            raise VideoError("it is empty (0 bytes). Copy it again, or remove it")
        file.seek(0)
        with av.open(file, "r", container_options=options, metadata_errors="replace") as container:
            # A cover picture of a song is a video stream of one frame.
            streams = [s for s in container.streams.video if s.frames != 1] or list(
                container.streams.video
            )
            if not streams:
                kinds = ", ".join(sorted({stream.type for stream in container.streams}))
                raise VideoError(f"it has no video, only {kinds or 'nothing'}. Remove it")
            stream = streams[0]
            context = stream.codec_context
            if context is None:  # its type says otherwise
                raise VideoError("no decoder is known for its codec. Convert it to H.264, say")
            _check_size(context.width, context.height, max_pixels)
            # Again in the decoder, before it takes memory: a frame may be larger than the header.
            context.options = {"max_pixels": str(max_pixels)}
            context.thread_count = threads
            stream.thread_type = "AUTO"
            yield container, stream


def read_info(place: MediaPlace, max_pixels: int) -> VideoInfo:
    """Read all packets once: when each frame is shown, and how. The first frame is decoded.

    Raises:
        VideoError: as ``open_video``; or the file ends early, or has no frame.
    """
    with open_video(place, max_pixels) as (container, stream):
        stamps: list[int | None] = []
        ends: list[int] = []
        frame: VideoFrame | av.error.FFmpegError | None = None
        for packet in container.demux(stream):
            if frame is None:  # the last packet, which is empty, gives what a decoder held back
                frame = _decode_first(packet)
            if packet.size and not packet.is_discard:
                stamps.append(packet.pts)
                ends.append(packet.duration or 0)
            if len(stamps) > MOST_FRAMES:
                raise VideoError(f"it has more than {MOST_FRAMES:,} frames. Cut it into parts")
        if not stamps:
            raise VideoError("it has no frame. Remove it")
        timeline, numbers, stamped = _timeline(stream, stamps, ends)
        _check_end(container, stream, timeline)
        rate = float(stream.sample_aspect_ratio or 1) or 1.0
        if isinstance(frame, av.error.FFmpegError):
            raise frame
        if frame is None:
            raise VideoError("no frame of it can be decoded. Copy it again, or remove it")
    orientation, notes = _orientation(frame), _notes(frame)
    height, width = float(frame.height), frame.width * rate
    _check_size(frame.width, frame.height, max_pixels)
    if not orientation.exact:
        notes = (*notes, "is turned by an angle that is no quarter turn; left as it is stored")
    if orientation.transposed:
        height, width = width, height
    return VideoInfo(
        timeline=timeline,
        numbers=numbers,
        stamped=stamped,
        height=height,
        width=width,
        orientation=orientation,
        notes=notes,
    )


@frozen
class Wanted:
    """The frames of one clip.

    Attributes:
        places: among ``VideoInfo.numbers``, never falling; the same one may stand several times.
    """

    places: Sequence[int]
    framing: Framing


def read_frames(
    place: MediaPlace,
    info: VideoInfo,
    clips: Sequence[Wanted],
    *,
    max_pixels: int,
    threads: int = 1,
) -> list[np.ndarray]:
    """Decode the frames of some clips in one pass, and bring each to the size of its framing.

    Returns:
        for each clip [F, H, W, 3] uint8, RGB.

    Raises:
        VideoError: a frame is damaged or missing.
    """
    results = [
        np.empty((len(clip.places), clip.framing.height, clip.framing.width, 3), np.uint8)
        for clip in clips
    ]
    targets = sorted(
        _Target(info.numbers[place], row, clip.framing, result)
        for clip, result in zip(clips, results, strict=True)
        for row, place in enumerate(clip.places)
    )

    def decode(*, seek: bool) -> int:
        with open_video(place, max_pixels, threads) as (container, stream):
            if seek and not _seek(container, targets[0].number):
                return 0
            return _fill(targets, container.decode(stream), info, seeked=seek)

    can_seek = info.stamped and targets[0].number > info.numbers[0]
    if can_seek and decode(seek=True) == len(targets):
        return results
    done = decode(seek=False)
    if done < len(targets):
        lost = bisect.bisect_left(info.numbers, targets[done].number)
        raise VideoError(
            f"its frame {lost} of {len(info.numbers)} cannot be decoded: it ends there, or is "
            "damaged. Copy it again, or remove it"
        )
    return results


@frozen(order=False, eq=False)
class _Target:
    """Where one frame goes."""

    number: int
    row: int
    framing: Framing
    result: np.ndarray

    def __lt__(self, other: _Target) -> bool:
        return self.number < other.number


def write_rgb(
    frame: VideoFrame,
    framing: Framing,
    orientation: Orientation,
    pixels: np.ndarray,
    *,
    is_video: bool = True,
) -> None:
    """Scale, turn and crop one frame, and write it to ``pixels`` [H, W, 3] uint8."""
    height, width = framing.scaled_height, framing.scaled_width
    if orientation.transposed:
        height, width = width, height
    has_alpha = any(component.is_alpha for component in frame.format.components)
    transfer = _HDR.get(frame.color_trc) if is_video else None
    space = None
    if is_video and frame.colorspace == _UNSPECIFIED:  # by custom of its kind, as players do
        if transfer is not None:
            space = Colorspace.BT2020
        elif frame.height >= _HD_ROWS:
            space = Colorspace.ITU709
    # One plane a color: swscale makes the same values as of packed pixels, in a third of the time.
    scaled = frame.reformat(
        width=width,
        height=height,
        format="gbrp16le" if transfer is not None else "gbrap" if has_alpha else "gbrp",
        src_colorspace=space,
        interpolation=_SCALING,
        threads=1,
    )
    rows = slice(framing.top, framing.top + framing.height)
    columns = slice(framing.left, framing.left + framing.width)

    def cut(plane: int) -> np.ndarray:
        return orientation.apply(_view_plane(scaled, plane))[rows, columns]

    if transfer is not None:
        is_wide = frame.color_primaries in (_UNSPECIFIED, _BT2020)
        stacked = np.stack([cut(plane) for plane in _RGB_PLANES], axis=-1)
        pixels[...] = to_sdr(stacked, transfer, wide=is_wide)
        return
    for color, plane in enumerate(_RGB_PLANES):
        pixels[..., color] = cut(plane)
    if has_alpha:  # before black, as players show it
        alpha = cut(_ALPHA_PLANE).astype(np.uint16)[..., None]
        pixels[...] = (pixels * alpha + 127) // 255


# -- details --------------------------------------------------------------------------------------


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise VideoError(
            f"its frames are {width} x {height}, more than the {max_pixels:,} pixels that are "
            "read. Scale it down, or raise max_pixels"
        )


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn the library's errors into reasons."""
    try:
        yield
    except av.error.DecoderNotFoundError as error:
        raise VideoError("nothing here decodes its codec. Convert it to H.264") from error
    except av.error.FFmpegError as error:
        raise VideoError(
            "it is no video that can be read, or it is damaged (its beginning or its index is "
            f"missing; {error.strerror}). Copy it again, or remove it"
        ) from error
    except (MemoryError, OverflowError) as error:
        raise VideoError(f"it asks for more memory than there is ({error})") from error


def _timeline(
    stream: VideoStream, stamps: Sequence[int | None], durations: Sequence[int]
) -> tuple[Timeline, tuple[int, ...], bool]:
    known = sorted({stamp for stamp in stamps if stamp is not None})
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    if len(known) < len(stamps) * 0.98:  # AVI and raw streams stamp some packets, or none
        count = len(stamps)
        times = tuple(place / rate for place in range(count))
        return Timeline(times, count / rate), tuple(range(count)), False
    base = float(stream.time_base or 0) or 1 / rate
    shown = [(stamp - known[0]) * base for stamp in known]
    mean = shown[-1] / (len(shown) - 1) if len(shown) > 1 else 1 / rate
    last = durations[max(range(len(stamps)), key=lambda i: stamps[i] or 0)] * base
    # A last frame with a duration of minutes is a mistake of the writer.
    end = shown[-1] + (last if 0 < last <= 10 * mean else mean)
    return Timeline(tuple(shown), end), tuple(known), True


def _check_end(container: InputContainer, stream: VideoStream, timeline: Timeline) -> None:
    """Refuse a file that is shorter than its header states."""
    count = len(timeline.times)
    if stream.frames and count < 0.98 * stream.frames:
        raise VideoError(
            f"it ends early: {count} of its {stream.frames} frames are there. Copy it again, or "
            "remove it"
        )
    # Matroska counts no frames. Sound may go on after the last picture.
    stated = (container.duration or 0) / av.time_base
    if len(container.streams) == 1 and timeline.duration < 0.9 * stated - 1:
        raise VideoError(
            f"it ends early, or is damaged: {timeline.duration:.3g} of its {stated:.3g} s are "
            "there. Copy it again, or remove it"
        )


def _decode_first(packet: Packet[VideoStream]) -> VideoFrame | av.error.FFmpegError | None:
    """Decode a packet; an error is returned, as the end of the file may explain it better."""
    try:
        return next(iter(packet.decode()), None)
    except av.error.FFmpegError as error:
        return error


def _orientation(frame: VideoFrame) -> Orientation:
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return UPRIGHT if matrix is None else read_matrix(bytes(matrix))


def _notes(frame: VideoFrame) -> tuple[str, ...]:
    notes = []
    if frame.color_trc in _HDR:
        notes.append(f"is HDR ({_HDR[frame.color_trc]}); its tones are mapped to SDR")
    if frame.interlaced_frame:
        notes.append("is interlaced: each frame shows two moments as a comb")
    if any(component.is_alpha for component in frame.format.components):
        notes.append("is transparent in part; put before black")
    return tuple(notes)


def _seek(container: InputContainer, stamp: int) -> bool:
    try:
        container.seek(stamp, stream=container.streams.video[0], backward=True)
    except av.error.FFmpegError:
        return False
    return True


def _fill(
    targets: Sequence[_Target], frames: Iterator[VideoFrame], info: VideoInfo, *, seeked: bool
) -> int:
    """Decode until all of ``targets`` are there; return how many are.

    Of each number the nearest decoded frame is taken, as some packets give no frame.
    """
    reach = 1.5 * (info.numbers[-1] - info.numbers[0]) / max(1, len(info.numbers) - 1)
    done = 0
    before: tuple[int, VideoFrame] | None = None
    for place, frame in enumerate(frames):
        number = frame.pts if info.stamped else place
        if number is None:
            continue
        if before is None and seeked and number > targets[0].number:
            return 0  # behind what was asked for, as containers without an index do
        while done < len(targets) and targets[done].number <= number:
            wanted = targets[done].number
            is_nearer = before is not None and wanted - before[0] < number - wanted
            nearest = before if before is not None and is_nearer else (number, frame)
            if abs(nearest[0] - wanted) > reach or nearest[1].is_corrupt:
                return done
            _put(targets[done], nearest[1], info)
            done += 1
        if done == len(targets):
            return done
        before = (number, frame)
    # The last frames may have been wanted a little later than the last that was decoded.
    while before is not None and done < len(targets) and targets[done].number - before[0] <= reach:
        _put(targets[done], before[1], info)
        done += 1
    return done


def _put(target: _Target, frame: VideoFrame, info: VideoInfo) -> None:
    write_rgb(frame, target.framing, info.orientation, target.result[target.row])


def _view_plane(frame: VideoFrame, number: int) -> np.ndarray:
    """Return a plane of a frame, [H, W] of 8 or 16 bits, without the padding of its lines."""
    plane = frame.planes[number]
    kind = np.dtype("u1" if frame.format.components[0].bits == 8 else "<u2")
    lines = np.frombuffer(memoryview(plane), kind).reshape(
        plane.height, plane.line_size // kind.itemsize
    )
    return lines[:, : plane.width]
