"""Clips and sheets come back as what was written."""

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from distill_media import (
    Lettering,
    MediaError,
    SheetRow,
    read_animation,
    shrink,
    write_contact_sheet,
    write_mp4,
)
from distill_media.drawing.lettering import FALLBACKS
from distill_runtime import printable, replace_file, to_uint8
from PIL import Image, ImageFont


def moving_square(frames: int = 9, side: int = 32) -> np.ndarray:
    clip = np.zeros((frames, side, side, 3), np.uint8)
    for frame in range(frames):
        clip[frame, 8:20, frame : frame + 12] = 255
    return clip


def read(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_mp4_keeps_every_frame_and_enlarges_by_whole_pixels(tmp_path: Path) -> None:
    clip = moving_square()
    write_mp4(clip, tmp_path / "deep" / "clip.mp4", smallest_side=100)
    frames = read(tmp_path / "deep" / "clip.mp4")
    assert frames.shape == (9, 128, 128, 3)
    expected = clip.astype(float).repeat(4, 1).repeat(4, 2)
    assert np.abs(frames.astype(float) - expected).mean() < 6


def test_odd_sizes_are_padded_to_even(tmp_path: Path) -> None:
    write_mp4(np.full((2, 5, 7, 3), 200, np.uint8), tmp_path / "odd.mp4", smallest_side=1)
    assert read(tmp_path / "odd.mp4").shape == (2, 6, 8, 3)


FILM = """
import sys, numpy as np
from distill_media import SheetRow, write_sheet_mp4
clips = np.random.default_rng(0).integers(0, 256, (2, 9, 32, 32, 3), np.uint8)
write_sheet_mp4([SheetRow("one", clips)] * 2, ["a", "b"], sys.argv[1])
"""


def test_equal_frames_give_equal_bytes_whatever_memory_holds(tmp_path: Path) -> None:
    written = set()
    for filled in ("0", "85"):  # what glibc leaves in memory that it hands out
        command = [sys.executable, "-c", FILM, str(tmp_path / "film.mp4")]
        subprocess.run(command, env=os.environ | {"MALLOC_PERTURB_": filled}, check=True)
        written.add((tmp_path / "film.mp4").read_bytes())
    assert len(written) == 1


def test_the_files_rate_is_the_one_asked_for(tmp_path: Path) -> None:
    write_mp4(moving_square(), tmp_path / "slow.mp4", fps=4)
    with av.open(str(tmp_path / "slow.mp4")) as container:
        assert container.streams.video[0].average_rate == 4


def test_a_batch_is_no_clip(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[T, H, W, 3\]"):
        write_mp4(np.zeros((1, 2, 8, 8, 3), np.uint8), tmp_path / "x.mp4")
    assert list(tmp_path.iterdir()) == []


def test_sheet_has_a_column_a_prompt_and_a_row_a_model(tmp_path: Path) -> None:
    clips = np.stack([moving_square(), np.zeros((9, 32, 32, 3), np.uint8)])
    rows = [SheetRow("teacher\n32 steps", clips), SheetRow("student", clips)]
    write_contact_sheet(rows, ["a square", "nothing"], tmp_path / "sheet.png")
    write_contact_sheet(rows[:1], ["a square", "nothing"], tmp_path / "one_row.png")
    write_contact_sheet(
        [SheetRow("teacher\n32 steps", clips[:1])], ["a square"], tmp_path / "one_cell.png"
    )
    full, one_row, one_cell = (
        Image.open(tmp_path / f"{name}.png").size for name in ("sheet", "one_row", "one_cell")
    )
    assert full[1] - one_row[1] == 96 + 12
    assert one_row[0] - one_cell[0] == 3 * 96 + 2 * 2 + 12


def test_sheet_shows_the_pixels(tmp_path: Path) -> None:
    red = np.zeros((1, 9, 32, 32, 3), np.uint8)
    red[..., 0] = 255
    write_contact_sheet([SheetRow("red", red)], ["red"], tmp_path / "red.png")
    pixels = np.asarray(Image.open(tmp_path / "red.png"))
    assert (pixels == (255, 0, 0)).all(-1).sum() == 3 * 96 * 96


def test_large_clips_shrink_by_area_means() -> None:
    stripes = np.zeros((2, 1, 64, 128, 3), np.uint8)
    stripes[..., ::2, :] = 200
    small = shrink(stripes, 32)
    assert small.shape == (2, 1, 16, 32, 3)
    assert (small == 100).all()
    assert shrink(small, 32) is small


def test_pixels_of_a_tensor_are_clamped_and_their_channels_last() -> None:
    clip = torch.zeros(2, 3, 4, 5, 6, dtype=torch.bfloat16)
    clip[1, 2, 3, 4, 5], clip[0, 0, 0, 0, 0] = 2.0, -1.0
    pixels = to_uint8(clip)
    assert pixels.shape == (2, 4, 5, 6, 3)
    assert pixels[1, 3, 4, 5].tolist() == [0, 0, 255]
    assert pixels.sum() == 255


def test_a_row_needs_one_clip_per_prompt(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one clip a prompt"):
        write_contact_sheet(
            [SheetRow("short", np.zeros((1, 9, 32, 32, 3), np.uint8))],
            ["a", "b"],
            tmp_path / "x.png",
        )
    with pytest.raises(ValueError, match="nothing to draw"):
        write_contact_sheet([], ["a"], tmp_path / "x.png")


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")

    def fail() -> None:
        with replace_file(target) as staging:
            staging.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
    assert target.read_text() == "old"


def test_text_of_any_language_is_drawn_or_its_numbers_are(tmp_path: Path) -> None:
    letters = Lettering(18)
    for text in (
        "一只红狐狸在雪地里奔跑",
        "ثعلب أحمر في الثلج",
        "🦊 ❄️ 👩‍🚀",
        "\u202ex",
        "\ue000\U0010fffd",
    ):
        lines = letters.wrap(text, 80)
        assert "".join(lines).replace(" ", "") == printable(text).replace(" ", "")
        assert all(letters.length(line) <= 80 or len(line) == 1 for line in lines)
    # No font has a character of private use: its number is shown.
    assert letters.length("\U0010fffd") == letters.length("\\U0010fffd")
    assert letters.length("x") < letters.length("xx") < letters.length("x\U0010fffd")


def test_characters_that_the_font_lacks_come_from_another(tmp_path: Path) -> None:
    if not any(_has(name) for name in FALLBACKS):
        pytest.skip("no font of another script is on this machine")
    arabic = Lettering(18).length("ثعلب")
    assert arabic < Lettering(18).length("\\u062b")


def _has(name: str) -> bool:
    try:
        ImageFont.truetype(name, 18)
    except OSError:
        return False
    return name in ("DejaVuSans.ttf", "NotoSansArabic-Regular.ttf")


def test_what_is_too_large_to_be_shown_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.mp4").open("wb") as file:
        file.truncate(2**28 + 1)  # a hole, which takes no disk
    with pytest.raises(MediaError, match="more than 268,435,456 bytes"):
        read_animation(tmp_path / "a.mp4")
    Image.new("1", (4097, 4096)).save(tmp_path / "a.png")
    with pytest.raises(MediaError, match="4097 x 4096; scale it down"):
        read_animation(tmp_path / "a.png")
