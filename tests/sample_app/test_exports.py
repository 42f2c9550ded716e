"""Exports for other tools, sampled beside the model that they were made from; and damaged ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import WanPipeline
from distill_export.cli import main as export
from distill_protocols import ConfigError
from distill_runfile.cli import EXIT_OK, EXIT_USAGE
from distill_sample import open_model, read_sample_source
from distill_sample.cli import main
from safetensors.torch import load_file, save_file
from sample_app.conftest import PROMPTS, TINY

BASE = TINY / "wan"


@pytest.fixture(scope="module")
def exports(out, tmp_path_factory) -> dict[str, Path]:
    """Folders of the averaged student, by format."""
    folders = {"diffusers": out / "student"}
    for name, options in {"comfyui": [], "lora": ["--lora-rank", "32"]}.items():
        folders[name] = tmp_path_factory.mktemp(name) / "student"
        args = ["--checkpoint", str(out), "--role", "student", "--ema", "--format", name]
        assert export([*args, "--to", str(folders[name]), *options]) == EXIT_OK
    return folders


def test_a_single_file_is_the_student_to_the_bit(out, exports, tmp_path):
    clips = open_model(out).sample(PROMPTS, seed=3)
    assert torch.equal(open_model(exports["comfyui"], base=BASE).sample(PROMPTS, seed=3), clips)
    args = ["--prompt", PROMPTS[0], "--base", str(BASE), "--to", str(tmp_path)]
    assert main([str(exports["comfyui"]), *args]) == EXIT_OK
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["roles"][0]["weights"] == "of the export"


def test_a_lora_is_what_it_is_in_the_stock_pipeline(exports):
    spec = json.loads((exports["lora"] / "sampler_spec.json").read_text())
    pipeline: Any = WanPipeline.from_pretrained(BASE)
    scheduler = getattr(diffusers, spec["scheduler"]["_class_name"])
    pipeline.scheduler = scheduler.from_config(spec["scheduler"])

    def sample_stock() -> torch.Tensor:
        torch.manual_seed(3)
        return pipeline(PROMPTS[0], output_type="pt", **spec["call"]).frames.transpose(1, 2)

    teacher = sample_stock()
    pipeline.load_lora_weights(exports["lora"])
    own = open_model(exports["lora"], base=str(BASE)).sample(PROMPTS[:1], seed=3)
    torch.testing.assert_close(own, sample_stock(), rtol=0, atol=1e-3)
    assert (own - teacher).abs().max() > 0.1


def test_weights_alone_need_their_base_and_nothing_else_does(out, exports, tmp_path, capsys):
    assert main([str(exports["lora"]), "--prompt", "a"]) == EXIT_USAGE
    assert "was that of a folder 'wan'. Name it with --base FOLDER" in capsys.readouterr().err
    for given in (out, exports["diffusers"]):
        assert main([str(given), "--prompt", "a", "--base", str(BASE)]) == EXIT_USAGE
        assert "Leave --base out" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no-such-folder"):
        read_sample_source(exports["lora"], base="./no-such-folder")
    # The hub id of the base is in the record, where it came from the hub.
    folder = Path(shutil.copytree(exports["lora"], tmp_path / "lora"))
    file = folder / "sampler_spec.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"path": "nobody/tiny-wan"}))
    with pytest.raises(ConfigError, match="nobody/tiny-wan"):
        read_sample_source(folder)


@pytest.mark.parametrize("format", ["diffusers", "comfyui", "lora"])
def test_damaged_weights_are_an_error_that_names_the_file(exports, tmp_path, capsys, format):
    base = [] if format == "diffusers" else ["--base", str(BASE)]
    to = tmp_path / "to"
    for damage in ("cut short", "missing", "another model's"):
        folder = tmp_path / damage / "student"
        shutil.copytree(exports[format], folder)
        for file in folder.glob("**/transformer/*.safetensors" if not base else "*.safetensors"):
            if damage == "cut short":
                file.write_bytes(file.read_bytes()[:5000])
            elif damage == "missing":
                file.unlink()
            else:
                tensors = load_file(file)
                save_file({name: value[:1].clone() for name, value in tensors.items()}, file)
        status = main([str(folder), "--prompt", "a", *base, "--to", str(to)])
        assert status != EXIT_OK
        if base:
            assert status == EXIT_USAGE
        error = capsys.readouterr().err
        assert str(folder) in error
        assert "Traceback" not in error
        assert not list(to.glob("*"))
