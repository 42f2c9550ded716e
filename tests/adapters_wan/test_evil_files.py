"""A pickle in a model's folder is never opened, under whatever name."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from distill_adapters_wan import PLUGIN, WanPipelineConfig
from distill_diffusers.components.encoders import load_encoder
from distill_protocols import DistillError, RoleSpec, WeightsError
from foreign_files import Evil
from transformers import UMT5EncoderModel

STEMS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
BIN = {**STEMS, "text_encoder": "pytorch_model"}


@pytest.fixture
def evil(tmp_path) -> Evil:
    evil = Evil(tmp_path / "marker")
    evil.assert_runs_code()
    return evil


def use(pipeline: Path, part: str) -> None:
    """Load ``part`` the way a run does."""
    config = WanPipelineConfig(num_frames=5, height=32, width=48, max_sequence_length=6)
    role = RoleSpec(name="teacher", path=str(pipeline), trainable=False)
    bundle = PLUGIN.load([role], config, device=torch.device("cpu"))
    adapter = PLUGIN.adapter(bundle, config, source=str(pipeline))
    if part == "vae":
        adapter.decode(torch.zeros(1, *adapter.latent_shape))
    if part in ("text_encoder", "tokenizer"):
        adapter.encode_condition(["a seven"])


@pytest.mark.parametrize("part", STEMS)
def test_each_part_is_read_where_it_is_whole(pipeline, part):
    use(pipeline, part)


@pytest.mark.parametrize("ending", [".bin", ".pt", ".pth", ".bin in an index"])
@pytest.mark.parametrize("part", STEMS)
def test_a_folder_with_pickles_alone_is_refused(pipeline, evil, part, ending):
    folder = pipeline / part
    (folder / f"{STEMS[part]}.safetensors").unlink()
    name = BIN[part] + ending.split()[0]
    torch.save({"weight": evil}, folder / name)
    if "index" in ending:
        index = json.dumps({"metadata": {}, "weight_map": {"weight": name}})
        (folder / f"{STEMS[part]}.safetensors.index.json").write_text(index)
        (folder / f"{BIN[part]}.bin.index.json").write_text(index)
    with pytest.raises(WeightsError, match=part):
        use(pipeline, part)
    assert not evil.touched


@pytest.mark.parametrize("zipped", [True, False, None], ids=["zip", "old", "bare"])
@pytest.mark.parametrize("part", STEMS)
def test_a_pickle_under_the_name_of_safetensors_is_refused(pipeline, evil, part, zipped):
    file = pipeline / part / f"{STEMS[part]}.safetensors"
    if zipped is None:
        file.write_bytes(pickle.dumps(evil))
    else:
        torch.save({"weight": evil}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=part):
        use(pipeline, part)
    assert not evil.touched


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "x.pt", "model.safetensors"])
def test_no_warm_start_from_a_pickle(pipeline, evil, name):
    folder = pipeline / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"weight": evil}, folder / name)
    for path in (pipeline, folder / name):
        with pytest.raises(WeightsError):
            _read(PLUGIN.weights(str(path)))
    assert not evil.touched


def _read(sources) -> None:
    for source in sources.values():
        source.read(source.describe())


def test_the_text_encoder_is_not_loaded_from_a_bin_file(pipeline, monkeypatch):
    """Its own library would: that it is asked for safetensors alone is what keeps it away."""
    folder = pipeline / "text_encoder"
    weights = {"shared.weight": torch.ones(8, 16)}
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        load_encoder(UMT5EncoderModel, folder, torch.float32)


def test_a_tokenizers_own_code_is_not_run(pipeline, evil):
    folder = pipeline / "tokenizer"
    (folder / "own.py").write_text(
        f"open({str(evil.marker)!r}, 'w').close()\nclass Own:\n    pass\n"
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises((DistillError, ValueError)):
        use(pipeline, "tokenizer")
    assert not evil.touched
