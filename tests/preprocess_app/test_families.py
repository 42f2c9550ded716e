"""The same clips for several families: each data set fits its model by construction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ltx_pipelines
import pytest
import torch
import wan_variants
import yaml
from distill_conditioning import DataConfig, LatentDataset, SampleShape, dataset_info
from distill_preprocess.cli import main
from distill_preprocess.request import cut_of, needs_first_frames, read_request
from distill_runfile.cli import EXIT_FAILED, EXIT_OK
from media_files import moving_frames, write_video


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for number in range(3):
        path = write_video(root / f"clips/{number}.mp4", moving_frames(30, 64, 96, seed=number))
        path.with_suffix(".txt").write_text("a seven moving left")
    wan_variants.template(root / "template")
    ltx_pipelines.build(root / "ltx")
    for name in ("t2v", "i2v-2.1", "ti2v"):
        wan_variants.build(name, root / "template", root / name)
    return root


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write(root: Path, tmp_path: Path, name: str, **changes: Any) -> Path:
    pipeline = {"num_frames": 9, "height": 32, "width": 64 if name == "ltx" else 48}
    pipeline["max_sequence_length"] = 512 if name == "i2v-2.1" else 6
    values = {
        "recipe": {"family": "ltx" if name == "ltx" else "wan"},
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
        ("ti2v", 24, False, {}),
        ("ti2v", 24, True, {"first_frames": True}),
        ("ltx", 25, False, {}),
    ],
    ids=["t2v", "i2v", "ti2v", "ti2v-first-frames", "ltx"],
)
def test_a_data_set_fits_its_model(root, tmp_path, name, rate, image, changes):
    file = write(root, tmp_path, name, **changes)
    config = read_request(file)
    assert cut_of(config).fps == rate
    assert needs_first_frames(config) == image
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


def test_first_frames_for_a_model_that_reads_none_are_refused(root, tmp_path, capsys):
    file = write(root, tmp_path, "ltx", first_frames=True)
    assert main(["--config", str(file)]) == EXIT_FAILED
    assert "reads text alone" in capsys.readouterr().err
    file = write(root, tmp_path, "t2v", first_frames=True)
    assert main(["--config", str(file)]) == EXIT_FAILED
    assert "read text alone" in capsys.readouterr().err
    assert main(["--config", str(write(root, tmp_path, "t2v"))]) == EXIT_OK
