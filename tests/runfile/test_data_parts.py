"""A data set that other parts computed than the run's is a problem of the file, by entry."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from distill_protocols import ConfigError
from distill_runfile import describe
from distill_runfile.read import read_config
from run_files import TINY
from safetensors.torch import load_file, save_file


@pytest.fixture
def wan(tmp_path, values) -> Path:
    """Copy the shipped models for the run."""
    folder = Path(shutil.copytree(TINY / "wan", tmp_path / "wan"))
    for role in values["models"].values():
        role["path"] = str(folder)
    return folder


@pytest.fixture
def data(tmp_path, values) -> Path:
    """Copy the shipped data set for the run."""
    folder = Path(shutil.copytree(TINY / "data", tmp_path / "data"))
    values["data"]["path"] = str(folder)
    return folder


def problems(path: Path, *, planning: bool = False) -> list[str]:
    with pytest.raises(ConfigError) as excinfo:
        read_config(path, planning=planning)
    return str(excinfo.value).splitlines()


def change_json(file: Path, **change) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def before_named_entries(data: Path) -> None:
    """Make the data set one of an earlier release."""
    index = json.loads((data / "index.json").read_text())
    del index["fingerprint"]
    (data / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("planning", [False, True])
def test_another_precision_is_named(values, write, planning):
    values["pipeline_config"]["text_encoder_precision"] = "bf16"
    [problem] = problems(write(values), planning=planning)
    assert ": data.path: " in problem
    assert "text_encoder.precision is fp32 in the data set and bf16 here" in problem
    values["data"]["accept"] = ["text_encoder.precision"]
    [note] = read_config(write(values)).notes
    assert "accepted, though text_encoder.precision is fp32" in note


def test_an_encoder_that_was_saved_again_is_accepted(values, write, wan):
    config = wan / "tokenizer" / "tokenizer_config.json"
    change_json(config, backend="tokenizers", is_local=True, tokenizer_class="TokenizersBackend")
    assert read_config(write(values)).notes == ()


def test_another_vae_is_refused_as_another_encoder_is(values, write, wan):
    def scale(file: Path) -> None:
        weights = {name: value * 1.7 + 0.1 for name, value in load_file(file).items()}
        save_file(weights, file, {"format": "pt"})

    scale(wan / "vae" / "diffusion_pytorch_model.safetensors")
    change_json(wan / "vae" / "config.json", latents_mean=[0.0] * 8)
    scale(wan / "text_encoder" / "model.safetensors")
    [problem] = problems(write(values))
    for entry in ("text_encoder.weights is ", "vae.statistics is ", "vae.weights is "):
        assert entry in problem
    values["data"]["accept"] = ["vae", "text_encoder.length"]
    [problem] = problems(write(values))
    assert "text_encoder.weights is " in problem
    assert "vae.weights" not in problem
    values["data"]["accept"] = ["vae", "text_encoder"]
    assert len(read_config(write(values)).notes) == 1


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"latents_mean": [0.5]}, r"latents_mean of .*vae has 1 number.* 8 channels"),
        ({"latents_std": [0.0] * 8}, r"latents_std of .*vae is .* above 0"),
        ({"latents_std": [1.0] * 7 + [float("nan")]}, r"vae/config\.json.*NaN is no JSON number"),
        ({"latents_mean": ["a"] * 8}, r"vae/config\.json.*must be a list of numbers"),
        ({"latents_mean": 3}, r"latents_mean of .*vae has 1 number"),
    ],
)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_statistics_that_cannot_normalise_are_problems(values, write, wan, change, word, elsewhere):
    change_json(wan / "vae" / "config.json", **change)
    if elsewhere:
        for role in values["models"].values():
            role["path"] = str(TINY / "wan")
        values["pipeline_config"]["components"] = str(wan)
    values["data"]["accept"] = ["vae"]
    reported = problems(write(values), planning=True)
    assert any(re.search(word, problem) for problem in reported), reported


def test_a_name_that_is_no_entry_cannot_be_accepted(values, write):
    values["data"]["accept"] = ["text_encodr"]
    [problem] = problems(write(values))
    assert "'text_encodr' is to be accepted" in problem
    assert "text_encoder, tokenizer" in problem


def test_a_data_set_of_an_earlier_release_is_taken_and_says_so_once(values, write, data):
    before_named_entries(data)
    config = read_config(write(values))
    [note] = config.notes
    assert "does not record which vae computed it" in note
    assert describe(config).count(note) == 1


def test_its_one_hash_is_still_compared(values, write, data, wan):
    before_named_entries(data)
    change_json(wan / "tokenizer" / "tokenizer_config.json", backend="tokenizers")
    [problem] = problems(write(values))
    assert "encoder is 53fef5ab2404 in the data set" in problem
    assert "files that compute nothing count in it too" in problem
    values["data"]["accept"] = ["encoder"]
    assert len(read_config(write(values)).notes) == 2


def test_without_the_encoder_the_other_entries_are_compared(values, write, wan):
    shutil.rmtree(wan / "text_encoder")
    [note] = read_config(write(values)).notes
    assert "text_encoder and tokenizer, which are not on this machine" in note
    change_json(wan / "vae" / "config.json", latents_mean=[0.0] * 8)
    [problem] = problems(write(values))
    assert "vae.statistics is " in problem
