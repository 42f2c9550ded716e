"""Whole runs of the app over every kind of Wan: clips to data set to validation to export."""

from __future__ import annotations

import pytest
import torch
import yaml
from distill_adapters_wan import PLUGIN, WanAdapter
from distill_conditioning import ShardWriter, preprocess
from distill_protocols import ConfigError, ModelBundle
from distill_runfile.read import read_config
from distill_train.run import run
from PIL import Image
from wan_variants import VARIANTS


def clips(count=4):
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        yield f"clip-{i}", "a seven moving left", torch.rand(3, 9, 32, 48, generator=generator)


def picture(path, value, size=(48, 32)):
    Image.new("RGB", size, (value, 40, 255 - value)).save(path)
    return str(path)


@pytest.fixture
def values(folder_of, tmp_path):
    """Name of a variant -> a run file's values, its data set made."""

    def values(name, method="finetune"):
        variant, path = VARIANTS[name], folder_of(name)
        adapter = WanAdapter(ModelBundle({}), PLUGIN, variant.config, source=path)
        with ShardWriter(tmp_path / "data") as writer:
            preprocess(clips(), adapter, writer, negative_prompt="", first_frames=variant.image)
        roles = {"student": {"path": path}}
        options = {"student_sampler": {"steps": 2, "guidance": 1.0}}
        if method == "dmd2":
            roles |= {"teacher": {"path": path}, "critic": {"path": path}}
            options |= {"generator_update_interval": 2, "real_score_guidance_scale": 2.0}
        return {
            "recipe": {"family": "wan", "method": method},
            "models": roles,
            "training": {
                "output_dir": str(tmp_path / "out"), "max_train_steps": 4, "global_batch_size": 2,
                "optimizer": {"lr": 1e-3},
            },
            "data": {"path": str(tmp_path / "data")},
            "pipeline_config": {
                "num_frames": 9, "height": 32, "width": 48,
                "max_sequence_length": variant.config.max_sequence_length,
            },
            "method_config": options,
            "checkpoint": {"export": [{"role": "student", "folder": "student"}]},
            "validation": {
                "prompts": ["a seven moving left", "a seven moving left"],
                "views": {"student": {"role": "student"}},
            },
        }  # fmt: skip

    return values


def started(values, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return read_config(file)


@pytest.mark.parametrize(
    ("name", "method"),
    [("i2v-2.1", "dmd2"), ("i2v-experts", "dmd2"), ("ti2v", "dmd2"), ("t2v-experts", "finetune")],
)
def test_a_run_validates_clips_that_begin_with_the_pictures(values, tmp_path, name, method):
    given = values(name, method)
    if VARIANTS[name].image:
        pictures = [picture(tmp_path / f"{i}.png", value) for i, value in enumerate((20, 230))]
        given["validation"]["images"] = pictures
    run(started(given, tmp_path))
    gif = Image.open(tmp_path / "out" / "validation" / "iteration-000004" / "student.gif")
    assert gif.n_frames == 9
    left, right = (gif.convert("RGB").crop(box) for box in ((0, 0, 48, 32), (48, 0, 96, 32)))
    assert (left.tobytes() == right.tobytes()) is False
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


def test_a_model_that_reads_text_alone_takes_no_picture(values, tmp_path):
    given = values("t2v-experts")
    given["validation"]["images"] = [picture(tmp_path / "a.png", 9)] * 2
    with pytest.raises(Exception, match="would have no effect"):
        run(started(given, tmp_path))
