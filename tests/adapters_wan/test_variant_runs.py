"""Whole runs of the app over every kind of Wan: clips to data set to validation to export."""

from __future__ import annotations

import pytest
import yaml
from distill_media import read_mp4
from distill_protocols import ConfigError
from distill_runfile.read import read_config
from distill_train.run import run
from PIL import Image
from slow_cases import slow_but
from wan_variants import VARIANTS


def picture(path, value, size=(48, 32)):
    Image.new("RGB", size, (value, 40, 255 - value)).save(path)
    return str(path)


def started(values, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return read_config(file)


@pytest.mark.parametrize(
    ("name", "method"),
    slow_but(
        ("flf2v-dmd2", "t2v-experts-finetune"),
        [("flf2v", "dmd2"), ("i2v-experts", "dmd2"), ("ti2v", "dmd2"), ("t2v-experts", "finetune")],
        "-".join,
    ),
)
def test_a_run_validates_clips_that_begin_with_the_pictures(values, tmp_path, name, method):
    given = values(name, method)
    if VARIANTS[name].image:
        pictures = [picture(tmp_path / f"{i}.png", value) for i, value in enumerate((20, 230))]
        given["validation"]["images"] = pictures
        if VARIANTS[name].pair:
            given["validation"]["last_images"] = pictures[::-1]
    run(started(given, tmp_path))
    folder = tmp_path / "out" / "validation" / "iteration-000004" / "student"
    one, two = (read_mp4(folder / name) for name in ("000.mp4", "001.mp4"))
    assert one.shape == two.shape == (9, 128, 192, 3)
    assert (one != two).any()
    assert (tmp_path / "out" / "student" / "model_index.json").exists()


def test_wrong_pictures_are_problems_of_the_file(values, tmp_path):
    given = values("i2v-2.1")
    for images, message in [
        ([], "bring no first frame"),
        ([str(tmp_path / "none.png")] * 2, "no such file"),
        ([picture(tmp_path / "a.png", 9)], "1 images for 2 prompts"),
    ]:
        given["validation"]["images"] = images
        with pytest.raises(ConfigError, match=message):
            started(given, tmp_path)


def test_a_picture_of_another_size_or_kind_ends_a_run_before_its_first_step(values, tmp_path):
    given = values("i2v-2.1")
    good, wide = picture(tmp_path / "a.png", 9), picture(tmp_path / "b.png", 9, size=(64, 32))
    (tmp_path / "c.png").write_bytes(b"no picture")
    for images, message in [
        ([wide, wide], "of the size of the run's clips"),
        ([good, wide], "several sizes"),
        ([good, str(tmp_path / "c.png")], "cannot be read as a PNG or JPEG image"),
    ]:
        given["validation"]["images"] = images
        with pytest.raises(Exception, match=message):
            run(started(given, tmp_path))
        assert not (tmp_path / "out" / "validation").exists()


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("t2v-experts", ("images",), r"validation\.images: role .* reads text alone"),
        ("flf2v", ("images",), r"validation\.images: role .*: no last frame is given"),
        ("i2v-2.1", ("images", "last_images"), "reads first ones alone"),
        ("ti2v", ("images", "videos"), "videos beside images"),
        ("ti2v", ("videos",), r"validation\.videos: .*4k \+ 1"),
        ("ti2v", ("last_images",), "no first frame is given"),
    ],
)
def test_frames_that_the_models_cannot_be_given_are_problems_of_the_file(
    values, tmp_path, name, keys, message
):
    given = values(name)
    given["validation"] |= dict.fromkeys(keys, [picture(tmp_path / "a.png", 9)] * 2)
    given["validation"] |= {"video_frames": 4} if "videos" in keys else {}
    with pytest.raises(ConfigError, match=message):
        started(given, tmp_path)
