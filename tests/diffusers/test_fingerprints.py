"""What computes data, read off a folder: only what computes counts, and each part has a name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from distill_diffusers import fingerprints
from distill_diffusers.fingerprints import (
    condition_fingerprint,
    hash_weights,
    image_fingerprint,
    latent_fingerprint,
)
from safetensors.torch import load_file, save_file

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny"
SETTINGS = {"text_encoder.length": 8, "text_encoder.precision": "fp32"}
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(TINY / "wan", tmp_path / "wan"))


def entries(folder: Path) -> dict[str, str]:
    parts = [("text_encoder", "tokenizer")]
    return {
        **latent_fingerprint(str(folder)),
        **condition_fingerprint(str(folder), parts, SETTINGS),
    }


def differing(one: dict[str, str], other: dict[str, str]) -> set[str]:
    assert one
    assert other
    return {name for name in one.keys() & other.keys() if one[name] != other[name]} - {"encoder"}


def change_json(file: Path, **change) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def test_an_encoder_that_was_saved_again_is_the_same(folder):
    """In two shards, with its tied table twice, and a tokenizer_config.json of another version."""
    from transformers import AutoTokenizer, UMT5EncoderModel

    before = entries(folder)
    model = UMT5EncoderModel.from_pretrained(folder / "text_encoder")
    model.save_pretrained(folder / "text_encoder", max_shard_size="200KB")
    (folder / "text_encoder" / "model.safetensors").unlink()
    [first, *others] = sorted((folder / "text_encoder").glob("*.safetensors"))
    assert others
    weights = load_file(first)
    name = "encoder.embed_tokens.weight"
    save_file({**weights, name: model.shared.weight.detach().clone()}, first, {"format": "pt"})
    index = folder / "text_encoder" / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map={**weight_map, name: first.name})
    was = (folder / "tokenizer" / "tokenizer_config.json").read_text()
    AutoTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(folder / "tokenizer")
    assert (folder / "tokenizer" / "tokenizer_config.json").read_text() != was
    after = entries(folder)
    assert differing(before, after) == set()
    assert before["encoder"] != after["encoder"]


def test_each_component_has_its_own_fingerprint_entry(folder):
    before = entries(folder)

    def differs(change, undo: Path) -> set[str]:
        content = undo.read_bytes()
        change(undo)
        names = differing(before, entries(folder))
        undo.write_bytes(content)
        return names

    def scale(file: Path) -> None:
        values = {name: value * 1.7 + 0.1 for name, value in load_file(file).items()}
        save_file(values, file, {"format": "pt"})

    def nudge(file: Path) -> None:
        values = load_file(file)
        values["shared.weight"][3, 3] += 1e-3
        save_file(values, file, {"format": "pt"})

    def swap_words(file: Path) -> None:
        value = json.loads(file.read_text())
        words = value["model"]["vocab"]
        words["seven"], words["nine"] = words["nine"], words["seven"]
        file.write_text(json.dumps(value))

    assert differs(scale, folder / VAE) == {"vae.weights"}
    assert differs(nudge, folder / "text_encoder/model.safetensors") == {"text_encoder.weights"}
    assert differs(swap_words, folder / "tokenizer/tokenizer.json") == {"tokenizer.vocabulary"}
    config, tokenizer = "vae/config.json", "tokenizer/tokenizer_config.json"
    changes = {
        "vae.statistics": (config, {"latents_std": [1.0] * 8}),
        "vae.config.is_residual": (config, {"is_residual": True}),
        "text_encoder.config.num_heads": ("text_encoder/config.json", {"num_heads": 2}),
        "tokenizer.pad_token": (tokenizer, {"pad_token": "<unk>"}),
    }
    for name, (file, change) in changes.items():
        assert differs(lambda path, c=change: change_json(path, **c), folder / file) == {name}


def test_unused_files_do_not_change_a_fingerprint(folder):
    before = entries(folder)
    change_json(folder / "text_encoder/config.json", architectures=["X"], torch_dtype="bfloat16")
    change_json(folder / "vae/config.json", _diffusers_version="9", _name_or_path="/elsewhere")
    change_json(folder / "tokenizer/tokenizer_config.json", model_max_length=10**30)
    change_json(folder / "tokenizer/tokenizer.json", truncation={"max_length": 4})
    assert differing(before, entries(folder)) == set()


def test_a_part_that_is_not_whole_has_no_entries(folder):
    (folder / "tokenizer/tokenizer.json").write_text("[" * 10_000)
    assert {name.partition(".")[0] for name in entries(folder)} == {"vae"}
    (folder / VAE).write_bytes((folder / VAE).read_bytes()[:-1])
    assert entries(folder) == {}
    assert latent_fingerprint("/nowhere") == image_fingerprint("/nowhere") == {}


def test_a_data_set_of_an_earlier_release_can_be_compared():
    """``encoder`` in the index of the shipped data set was written by release 1.0.0."""
    recorded = json.loads((TINY / "data" / "index.json").read_text())["encoder"]
    assert entries(TINY / "wan")["encoder"] == recorded == "53fef5ab240459774805f56370ba9da7"


@pytest.mark.parametrize("offset", [0, 100_000, 199_999])
def test_large_weights_are_sampled_to_their_ends(tmp_path, monkeypatch, offset):
    monkeypatch.setattr(fingerprints, "_WHOLE_BYTES", 1000)
    file = tmp_path / "a.safetensors"
    values = {"big": torch.zeros(200_000, dtype=torch.uint8), "small": torch.zeros(5)}
    save_file(values, file)
    before = hash_weights([file])
    values["big"][offset] = 1
    save_file(values, file)
    seen = offset != 100_000  # between two samples, as the module documents
    assert (hash_weights([file]) != before) == seen
    monkeypatch.setattr(fingerprints, "_WHOLE_BYTES", 10**6)
    assert hash_weights([file]) != before


def test_neither_names_nor_files_of_weights_count(tmp_path):
    one, two = torch.arange(4.0), torch.arange(6.0)
    save_file({"a": one, "b": two}, tmp_path / "all.safetensors")
    save_file({"x": two}, tmp_path / "1.safetensors")
    save_file({"y": one}, tmp_path / "2.safetensors")
    parts = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    assert hash_weights([tmp_path / "all.safetensors"]) == hash_weights(parts)
    save_file({"y": one.view(2, 2)}, tmp_path / "2.safetensors")
    assert hash_weights([tmp_path / "all.safetensors"]) != hash_weights(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_statistics_in_buffers_are_read(folder, dtype):
    mean = torch.tensor([0.5, -0.25, 3.0], dtype=dtype)
    values = load_file(folder / VAE) | {"latents_mean": mean, "latents_std": mean.abs()}
    save_file(values, folder / VAE, {"format": "pt"})
    statistics = fingerprints.latent_statistics(folder / "vae")
    assert statistics["latents_mean"] == [0.5, -0.25, 3.0]
    assert statistics["latents_std"] == [0.5, 0.25, 3.0]
