"""Clips out of real files: which frames, which way up, which part, and why others are refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from distill_media import (
    ClipShape,
    CutConfig,
    MediaClip,
    MediaError,
    MediaItem,
    MediaPlace,
    plan_clips,
)
from distill_media import read_clips as read
from media_files import (
    BLUE,
    GREEN,
    GREY,
    RED,
    frame_numbers,
    moving_frames,
    numbered_frames,
    quarters,
    set_matrix,
    write_audio,
    write_picture,
    write_tar,
    write_video,
)

SMALL = ClipShape(5, 32, 48)


def item(path: Path, **changes) -> MediaItem:
    place = MediaPlace(path, path.name)
    return MediaItem(id=path.name, captions=("x",), place=place, **changes)


def clips(path: Path, *shapes: ClipShape, scene_cuts=None, segment=None, **cut) -> list[MediaClip]:
    shapes = shapes or (SMALL,)
    found = item(path, segment=segment)
    return list(read(found, shapes, CutConfig(**cut), scene_cuts=scene_cuts))


def corners(frame: np.ndarray) -> list[tuple[int, ...]]:
    """Return the colours of the four quarters: top left, top right, bottom left, bottom right."""
    height, width = frame.shape[:2]
    places = [(1, 1), (1, 3), (3, 1), (3, 3)]
    return [tuple(map(int, frame[height * r // 4, width * c // 4])) for r, c in places]


def assert_quarters(frame: np.ndarray, expected: list[tuple[int, int, int]]) -> None:
    for found, color in zip(corners(frame), expected, strict=True):
        assert np.abs(np.array(found) - color).max() < 12, (corners(frame), expected)


# -- which frames ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fps", "expected"),
    [("keep", [0, 1, 2, 3, 4]), (8, [0, 2, 4, 6, 8]), (16, [0, 1, 2, 3, 4]), (32, [0, 0, 1, 1, 2])],
)
def test_frames_are_resampled_by_time(tmp_path, fps, expected):
    path = write_video(tmp_path / "a.mp4", numbered_frames(20), fps=16)
    [clip] = clips(path, fps=fps)
    assert frame_numbers(clip.frames) == expected
    assert clip.frames.shape == (5, 32, 48, 3)


def test_a_variable_rate_is_followed_by_its_time_stamps(tmp_path):
    times = [0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.3, 1.7, 2.1]
    path = write_video(tmp_path / "a.mkv", numbered_frames(10), times=times)
    [clip] = clips(path, fps=5)
    assert frame_numbers(clip.frames) == [0, 2, 3, 4, 5]  # nearest, of two the earlier
    [clip] = clips(path, fps=2.5, segment=(0.5, 9.0))
    assert frame_numbers(clip.frames) == [4, 6, 7, 8, 9]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "webm", "mov", "gif"])
def test_containers(tmp_path, suffix):
    codec, pix_fmt = {
        "webm": ("libvpx-vp9", "yuv420p"), "avi": ("mpeg4", "yuv420p"), "gif": ("gif", "rgb8"),
    }.get(suffix, ("libx264", "yuv420p"))  # fmt: skip
    frames = numbered_frames(24)
    options = {"bf": "2", "qmin": "1", "qmax": "1"} if suffix == "avi" else None
    path = write_video(
        tmp_path / f"a.{suffix}", frames, fps=8, codec=codec, pix_fmt=pix_fmt, options=options
    )
    found = clips(path, take="windows", fps="keep")
    numbers = [frame_numbers(clip.frames) for clip in found]
    if suffix == "gif":  # of 8 greys
        assert [len(n) for n in numbers] == [5, 5, 5, 5]
    else:
        assert numbers == [list(range(5 * n, 5 * n + 5)) for n in range(4)]
    assert [clip.id for clip in found] == [path.name] + [f"{path.name}#{n}" for n in (2, 3, 4)]
    assert found[3].start == pytest.approx(15 / 8, abs=0.02)
    [later] = clips(path, fps="keep", segment=(10 / 8, 99))  # behind a seek
    assert suffix == "gif" or frame_numbers(later.frames) == [10, 11, 12, 13, 14]


def test_windows_and_uniform(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered_frames(23))

    def firsts(**cut) -> list[int]:
        return [frame_numbers(clip.frames)[0] for clip in clips(path, **cut)]

    assert firsts(take="head") == [0]
    assert firsts(take="uniform", count=1) == [9]
    assert firsts(take="uniform", count=4) == [0, 6, 12, 18]
    assert firsts(take="windows", stride=7) == [0, 7, 14]
    assert firsts(take="windows", count=2) == [0, 5]


def test_no_clip_goes_over_a_scene_cut(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered_frames(24))
    cuts = {"a.mp4": [7 / 8, 10 / 8]}
    found = clips(path, take="windows", scene_cuts=cuts)
    assert [frame_numbers(clip.frames) for clip in found] == [
        [0, 1, 2, 3, 4], [10, 11, 12, 13, 14], [15, 16, 17, 18, 19],
    ]  # fmt: skip


def test_audio_is_ignored_and_one_frame_is_a_clip(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered_frames(6), audio=True)
    assert len(clips(path)) == 1
    path = write_video(tmp_path / "one.mp4", numbered_frames(1))
    [clip] = clips(path, ClipShape(1, 32, 48), SMALL, fps=16)
    assert clip.shape == ClipShape(1, 32, 48)


# -- which way up, which part ---------------------------------------------------------------------

TURNED = {
    90: [BLUE, RED, GREY, GREEN], 180: [GREY, BLUE, GREEN, RED], 270: [GREEN, GREY, RED, BLUE],
    "mirrored": [GREEN, RED, GREY, BLUE], "odd": [RED, GREEN, BLUE, GREY],
}  # fmt: skip


@pytest.mark.parametrize("turn", TURNED)
def test_a_display_matrix_is_followed(tmp_path, turn):
    path = set_matrix(write_video(tmp_path / "a.mp4", quarters()), turn)
    shapes = [ClipShape(3, 64, 96), ClipShape(3, 96, 64)]
    [clip] = clips(path, *shapes)
    assert clip.shape == shapes[turn in (90, 270)]
    assert_quarters(clip.frames[0], TURNED[turn])
    assert ("no quarter turn" in "".join(clip.notes)) == (turn == "odd")


@pytest.mark.parametrize(("orientation", "turn"), [(6, 90), (3, 180), (8, 270), (2, "mirrored")])
def test_a_pictures_orientation_is_followed(tmp_path, orientation, turn):
    path = write_picture(tmp_path / "a.jpg", quarters()[0], orientation=orientation)
    [clip] = clips(path, ClipShape(1, 64, 96), ClipShape(1, 96, 64))
    assert_quarters(clip.frames[0], TURNED[turn])


def test_a_picture_is_cut_out_of_its_middle_or_by_the_seed(tmp_path):
    ramp = np.broadcast_to(np.arange(0, 200, dtype=np.uint8)[None, :, None], (50, 200, 3)).copy()
    path = write_picture(tmp_path / "a.png", ramp)
    shape = ClipShape(1, 48, 48)
    [middle] = clips(path, shape)
    assert 96 <= middle.frames.mean() <= 104
    by_seed = {s: clips(path, shape, crop="random", seed=s)[0].frames.mean() for s in range(6)}
    assert len(set(by_seed.values())) > 3
    assert clips(path, shape, crop="random", seed=3)[0].frames.mean() == by_seed[3]


def test_colours_are_those_that_were_written(tmp_path):
    path = write_video(tmp_path / "a.mp4", quarters())
    [clip] = clips(path, ClipShape(3, 64, 96))
    assert_quarters(clip.frames[2], [RED, GREEN, BLUE, GREY])


def test_scaling_down_does_not_alias(tmp_path):
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    path = write_picture(tmp_path / "a.png", stripes)
    [clip] = clips(path, ClipShape(1, 32, 32))
    assert clip.frames[:, :, 4:-4].std() < 12  # grey, not stripes of another width


def test_pixels_that_are_not_square_are_shown_so(tmp_path):
    path = tmp_path / "a.mkv"
    write_video(path, quarters(3, 64, 64), options={"aspect": "2:1", "crf": "4"})
    shapes = [ClipShape(3, 32, 32), ClipShape(3, 32, 64)]
    import av

    with av.open(str(path)) as container:
        ratio = container.streams.video[0].sample_aspect_ratio
    [clip] = clips(path, *shapes)
    assert clip.shape == shapes[ratio == 2]


def test_pictures_of_other_modes(tmp_path):
    from PIL import Image

    shape = ClipShape(1, 32, 48)
    clear = np.zeros((64, 96, 4), np.uint8)
    clear[:, :48] = (200, 100, 50, 255)
    [clip] = clips(write_picture(tmp_path / "alpha.png", clear), shape)
    assert "transparent" in clip.notes[0]
    assert clip.frames[0, :, :20].mean(axis=(0, 1)) == pytest.approx([200, 100, 50], abs=2)
    assert clip.frames[0, :, 30:].max() <= 2
    Image.fromarray(np.full((64, 96), 40000, np.uint16)).save(tmp_path / "deep.png")
    assert clips(tmp_path / "deep.png", shape)[0].frames.mean() == pytest.approx(155, abs=2)
    Image.fromarray(quarters()[0]).convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert clips(tmp_path / "cmyk.jpg", shape)[0].frames.shape == (1, 32, 48, 3)
    Image.fromarray(quarters()[0]).convert("P").save(tmp_path / "palette.png")
    assert_quarters(clips(tmp_path / "palette.png", shape)[0].frames[0], [RED, GREEN, BLUE, GREY])


def test_members_of_a_tar_are_read_in_place(tmp_path):
    content = write_video(tmp_path / "a.mp4", numbered_frames(6)).read_bytes()
    tar = write_tar(tmp_path / "t.tar", {"junk.cls": b"1" * 700, "a.mp4": content})
    offset = tar.read_bytes().index(content)
    place = MediaPlace(tar, "a.mp4", offset=offset, size=len(content))
    [clip] = read(MediaItem(id="t/a.mp4", place=place), [SMALL], CutConfig())
    assert frame_numbers(clip.frames) == [0, 1, 2, 3, 4]


def with_bars(frames: np.ndarray) -> np.ndarray:
    """Put frames between bars of a quarter of their height each, a little brighter than black."""
    count, height, width, _ = frames.shape
    bar = np.full((count, height // 4, width, 3), 6, np.uint8)
    return np.concatenate([bar, frames, bar], axis=1)


def test_bars_are_cut_off_before_a_bucket_is_chosen(tmp_path):
    inside = moving_frames(20, 64, 128)
    path = write_video(tmp_path / "a.mp4", with_bars(inside))  # 96 x 128 in all
    wide, square = ClipShape(5, 28, 56), ClipShape(5, 48, 64)
    [plain] = clips(path, wide, square)
    assert plain.shape == square
    assert (plain.frames[:, :7] < 16).all()
    [cut] = clips(path, wide, square, crop_bars=True)
    assert cut.shape == wide
    assert (cut.frames.max(axis=(0, 2, 3)) > 40).all()
    assert cut.notes == (
        "had black bars, which were cut off (65 % of its height and 100 % of its width are left)",
    )
    [expected] = clips(write_video(tmp_path / "b.mp4", inside[:, 1:-1]), wide)
    assert np.abs(cut.frames.astype(int) - expected.frames).mean() < 12


def test_what_is_black_only_for_a_while_is_no_bar(tmp_path):
    frames = moving_frames(20, 64, 96)
    frames[:10] = with_bars(frames[:10, :44])[:, :64]
    path = write_video(tmp_path / "a.mp4", frames)
    [cut] = clips(path, crop_bars=True)
    assert cut.notes == ()
    [plain] = clips(path)
    assert np.array_equal(cut.frames, plain.frames)


def test_bars_of_a_picture_and_a_picture_that_is_black(tmp_path):
    [cut] = clips(
        write_picture(tmp_path / "a.png", with_bars(moving_frames(1, 64, 128))[0]),
        ClipShape(1, 28, 56), ClipShape(1, 48, 64), crop_bars=True,
    )  # fmt: skip
    assert cut.shape == ClipShape(1, 28, 56)
    black = write_picture(tmp_path / "b.png", np.zeros((64, 96, 3), np.uint8))
    [clip] = clips(black, ClipShape(1, 32, 48), crop_bars=True)
    assert clip.notes == ()


def test_a_scan_opens_a_video_once_and_knows_how_it_is_shown(tmp_path, monkeypatch):
    path = set_matrix(write_video(tmp_path / "a.mp4", quarters(9)), 90)
    opened = []
    opens = MediaPlace.open
    monkeypatch.setattr(MediaPlace, "open", lambda place: opened.append(place) or opens(place))
    [planned] = plan_clips(item(path), [ClipShape(5, 48, 32)], CutConfig())
    assert len(opened) == 1
    assert planned.info is not None
    assert planned.info.orientation.transposed


# -- refused files and their messages ------------------------------------------------------------


def truncated(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def faststart(path: Path, **more) -> Path:
    return write_video(path, moving_frames(48), options={"movflags": "faststart"}, **more)


def playlist(path: Path) -> Path:
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n")
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def damaged_png(path: Path) -> Path:
    write_picture(path, moving_frames(1)[0])
    return truncated(path, 0.5)


def unknown_codec(path: Path) -> Path:
    write_video(path, moving_frames(24))
    return written(path, path.read_bytes().replace(b"avc1", b"av?1"))


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


BAD = {
    "empty.mp4": (lambda p: written(p, b""), "it is empty"),
    "empty.png": (lambda p: written(p, b""), "it is empty"),
    "text.mp4": (lambda p: written(p, b"I am no video" * 99), "no video that can be read"),
    "text.png": (lambda p: written(p, b"I am no picture" * 99), "no picture that can be read"),
    "no-index.mp4": (lambda p: truncated(write_video(p, moving_frames(24)), 0.6), "no video that"),
    "cut-off.mp4": (lambda p: truncated(cut_off(p), 0.5), "it ends early"),
    "half.png": (damaged_png, "it is damaged"),
    "audio.mp4": (write_audio, "no video, only audio"),
    "short.mp4": (lambda p: write_video(p, numbered_frames(4)), "it has 4 frames at the rate"),
    "small.mp4": (lambda p: write_video(p, numbered_frames(9, 24, 40)), "smaller than every"),
    "huge.png": (lambda p: write_picture(p, np.zeros((900, 900, 3), np.uint8)), "900 x 900, more"),
    "huge.mp4": (lambda p: write_video(p, numbered_frames(5, 800, 800)), "800 x 800, more than"),
    "playlist.mp4": (playlist, "no video that can be read"),
    "pipe.mp4": (pipe, "it cannot be read"),
    "pipe.png": (pipe, "it cannot be read"),
    "folder.mp4": (lambda p: p.mkdir() or p, "it cannot be read"),
    "gone.mp4": (lambda p: p, "it cannot be read"),
    "picture.mp4": (lambda p: written(p, png_bytes()), "no video that can be read"),
    "codec.mp4": (unknown_codec, "no decoder is known for its codec"),
    "header.mp4": (lambda p: written(p, b"\0\0\0\x18ftypmp42"), "no video|no frame"),
}


def cut_off(path: Path) -> Path:
    """Write an MP4 whose index comes first, and cut it short: it opens, and ends early."""
    import av

    whole = write_video(path.with_name("whole.mkv"), moving_frames(48))
    with (
        av.open(str(whole)) as source,
        av.open(str(path), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return path


def png_bytes() -> bytes:
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(quarters()[0]).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_named_with_its_reason(tmp_path, name):
    make, reason = BAD[name]
    path = make(tmp_path / name)
    with pytest.raises(MediaError, match=reason) as caught:
        clips(path, max_pixels=500_000)
    assert caught.value.item == name
    assert str(caught.value).startswith(f"{name}: ")
    assert not caught.value.reason.startswith(name)


def test_a_frame_that_is_damaged_in_the_middle(tmp_path):
    # With more threads, or looking ahead, x264 does not write the same bytes each time.
    alike = "threads=1:rc-lookahead=0:mbtree=0"
    options = {"g": "10", "crf": "10", "x264-params": alike}
    path = write_video(tmp_path / "a.mkv", moving_frames(60), options=options)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(3000)
    path.write_bytes(content)
    with pytest.raises(MediaError, match="the shortest bucket takes 57"):
        clips(path, ClipShape(57, 32, 48))
    found = clips(path, take="windows")
    assert 4 <= len(found) < 11
    steps = np.diff([clip.start for clip in found])
    assert steps.max() > 2  # over what is lost there is no clip


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("odd.mkv", {"frames": quarters(5, 65, 97), "codec": "ffv1", "pix_fmt": "yuv444p"}),
        ("ten.mkv", {"frames": quarters(5), "codec": "ffv1", "pix_fmt": "yuv420p10le"}),
        ("grey.mp4", {"frames": numbered_frames(5), "pix_fmt": "gray"}),
        ("full.mp4", {"frames": quarters(5), "pix_fmt": "yuvj420p"}),
        ("alpha.mov", {"frames": np.dstack, "codec": "qtrle", "pix_fmt": "argb"}),
        ("name with spaces 🦊\n.mp4", {"frames": quarters(5)}),
    ],
    ids=["odd", "10bit", "grey", "full-range", "alpha", "name"],
)
def test_unusual_videos_are_read(tmp_path, name, options):
    options = dict(options)
    frames = options.pop("frames")
    colors = [RED, GREEN, BLUE, GREY]
    if name == "alpha.mov":
        alpha = np.full((5, 64, 96, 1), 255, np.uint8)
        alpha[:, :32, :48] = 128  # half of the red, before black
        colors[0] = (110, 15, 15)
        frames, options["source_format"] = np.concatenate([quarters(5), alpha], 3), "rgba"
    path = write_video(tmp_path / name, frames, **options)
    [clip] = clips(path)
    if name != "grey.mp4":
        assert_quarters(clip.frames[4], colors)
    assert bool(clip.notes) == (name == "alpha.mov")
