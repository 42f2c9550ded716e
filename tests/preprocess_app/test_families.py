"""The same clips for several families: each data set fits its model by construction."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hunyuan_pipelines
import ltx_pipelines
import numpy as np
import pytest
import torch
import wan_variants
import yaml
from distill_conditioning import DataConfig, LatentDataset, SampleShape, dataset_info
from distill_media import ClipShape, MediaClip
from distill_preprocess.cli import main
from distill_preprocess.encoding import Encoder
from distill_preprocess.request import cut_of, given_frames_of, read_request
from distill_protocols import Condition, GivenFrames
from distill_runfile.cli import EXIT_OK, EXIT_USAGE
from media_files import moving_frames, write_video
from stored_files import columns, write_parquet


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for number in range(3):
        path = write_video(root / f"clips/{number}.mp4", moving_frames(30, 64, 96, seed=number))
        path.with_suffix(".txt").write_text("a seven moving left")
    wan_variants.template(root / "template")
    ltx_pipelines.build(root / "ltx")
    hunyuan_pipelines.build15(root / "hunyuan15", "i2v")
    for name in ("t2v", "i2v-2.1", "flf2v", "ti2v"):
        wan_variants.build(name, root / "template", root / name)
    return root


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write(root: Path, tmp_path: Path, name: str, **changes: Any) -> Path:
    pipeline = {"num_frames": 9, "height": 32, "width": 64 if name == "ltx" else 48}
    pipeline["max_sequence_length"] = 512 if name in ("i2v-2.1", "flf2v") else 6
    if name == "hunyuan15":
        pipeline["glyph_sequence_length"] = 6
    values = {
        "recipe": {"family": {"ltx": "ltx", "hunyuan15": "hunyuan_video15"}.get(name, "wan")},
        "models": {"teacher": {"path": str(root / name)}},
        "pipeline_config": pipeline,
        "conditioning": {"negative_prompt": ""},
        "preprocess": {
            "output_dir": "./data", "sources": [{"folder": str(root / "clips")}],
            "cpu_threads": 1, "device": "cpu", **changes,
        },
    }  # fmt: skip
    file = tmp_path / "data.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.parametrize(
    ("name", "rate", "image", "changes"),
    [
        ("t2v", 16, False, {}),
        ("i2v-2.1", 16, True, {}),
        ("flf2v", 16, True, {}),
        ("ti2v", 24, False, {}),
        ("ti2v", 24, True, {"first_frames": True}),
        ("ltx", 25, False, {}),
        ("ltx", 25, True, {"first_frames": True}),
        ("hunyuan15", 24, True, {}),
    ],
    ids=[
        "t2v",
        "i2v",
        "flf2v",
        "ti2v",
        "ti2v-first-frames",
        "ltx",
        "ltx-first-frames",
        "hunyuan15",
    ],
)
def test_a_data_set_fits_its_model(root, tmp_path, name, rate, image, changes):
    file = write(root, tmp_path, name, **changes)
    config = read_request(file)
    assert cut_of(config).fps == rate
    assert given_frames_of(config).first == image
    weights = list((root / name).glob("transformer*/*.safetensors"))
    assert weights
    for path in weights:
        path.rename(path.with_suffix(".away"))
    try:
        # The check of the file wants the model whole, as the run will; the work does not.
        from distill_preprocess.run import run

        assert run(config)
    finally:
        for path in weights:
            path.with_suffix(".away").rename(path)
    family, pipeline, source = config.family_plugin, config.pipeline, config.source
    latents = family.latent_shape(pipeline, source=source)
    assert latents is not None
    shape = SampleShape(
        latents=latents, conditions=family.condition_shapes(pipeline, source=source)
    )
    fingerprint = family.fingerprint(pipeline, source=source)
    info = dataset_info(tmp_path / "data", shapes=[shape], fingerprint=fingerprint)
    assert (info.problems, info.samples) == ((), 3)
    cond = LatentDataset(DataConfig(path=str(tmp_path / "data"))).read(torch.arange(3)).cond
    assert ("image_latents" in cond.tensors) == image
    if image:
        pictures = cond.tensors["image_latents"]
        assert not torch.equal(pictures[0], pictures[1])


def test_fastvideos_samples_of_image_to_video_are_taken_as_they_are(root, tmp_path, capsys):
    assert main(["--config", str(write(root, tmp_path, "i2v-2.1"))]) == EXIT_OK
    made = LatentDataset(DataConfig(path=str(tmp_path / "data"), shuffle=False))
    batch = made.read(torch.arange(3))
    theirs = {
        "vae_latent": batch.latents, "text_embedding": batch.cond.tensors["text"],
        "first_frame_latent": batch.cond.tensors["image_latents"],
        "clip_feature": batch.cond.tensors["image_embeds"],
    }  # fmt: skip
    rows = []
    for number in range(3):
        own = {"id": str(number), "caption": "a seven moving left"}
        for name, values in theirs.items():
            own |= columns(name, values[number].numpy(), "float32")
        rows.append(own)
    small = columns("clip_feature", np.zeros((3, 4), np.float32), "float32")
    empty = {"first_frame_latent_bytes": b"", "first_frame_latent_shape": []}
    write_parquet(tmp_path / "parquet/0.parquet", [*rows, rows[0] | small, rows[0] | empty])
    changes = {"sources": [{"latents": str(tmp_path / "parquet")}], "output_dir": "./stored"}
    file = write(root, tmp_path, "i2v-2.1", latent_dtype="float32", **changes)
    assert main(["--config", str(file)]) == EXIT_OK
    stored = LatentDataset(DataConfig(path=str(tmp_path / "stored"), shuffle=False))
    again = stored.read(torch.arange(len(stored)))
    assert torch.equal(again.latents, batch.latents)
    assert again.cond.tensors.keys() == batch.cond.tensors.keys()
    for name, value in batch.cond.tensors.items():
        assert torch.equal(again.cond.tensors[name], value), name
    report = (tmp_path / "stored/report.jsonl").read_text()
    assert "its clip feature is [3, 4]" in report
    assert "it holds no first_frame_latent, which the models read" in report
    # A model of text alone takes the same files and leaves the pictures.
    file = write(root, tmp_path, "t2v", **changes | {"output_dir": "./text"})
    assert main(["--config", str(file), "--dry-run"]) == EXIT_OK


def test_each_caption_is_given_the_frames_that_its_clip_begins_and_ends_with():
    given: list[Any] = []

    class Images:
        def with_image(self, rows, pictures, frames, last=None):
            given[:] = pictures, frames, last
            return rows

    adapter: Any = SimpleNamespace(images=Images())
    encoder = Encoder(
        adapter=adapter, device=torch.device("cpu"), given=GivenFrames(first=1, last=True),
        dtype="float32", cache=None, fingerprint={},
    )  # fmt: skip
    frames = np.repeat(np.arange(0, 255, 51, np.uint8), 12).reshape(5, 2, 2, 3)  # fifths
    clip = MediaClip(id="a", shape=ClipShape(5, 2, 2), frames=frames)
    encoder.add_given_frames(Condition({"text": torch.ones(2, 4)}), clip)
    pictures, frames, last = given
    assert torch.equal(pictures, torch.zeros(2, 3, 2, 2))
    assert frames == 5
    assert torch.equal(last, torch.full((2, 3, 2, 2), 0.8))


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("t2v", {"first_frames": True}, "first_frames: frames of a clip are given, and the model"),
        ("t2v", {"last_frame": True}, "last_frame: frames of a clip are given, and the model"),
        ("i2v-2.1", {"first_frames": False}, "first_frames: no first frame is given"),
        ("i2v-2.1", {"last_frame": True}, "last_frame: a last frame is given, and the model reads"),
        ("flf2v", {"last_frame": False}, "last_frame: no last frame is given"),
        ("ti2v", {"first_frames": 3}, "first_frames: 3 first frames are given, and there must be"),
        ("ltx", {"first_frames": 9}, "leaves nothing to be made"),
        ("ti2v", {"first_frames": 0}, "0 counts frames"),
    ],
)
def test_frames_that_a_model_cannot_be_given_are_problems_of_the_file(
    root, tmp_path, capsys, name, changes, problem
):
    assert main(["--config", str(write(root, tmp_path, name, **changes))]) == EXIT_USAGE
    assert problem in capsys.readouterr().err
