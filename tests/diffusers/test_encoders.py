"""Several text encoders of one pipeline folder, side by side."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
import wan_variants
from distill_diffusers.components import encoders as components
from distill_diffusers.components.encoders import TextEncoderPart, TextEncoders
from distill_protocols import WeightsError

UMT5 = "transformers.models.umt5.modeling_umt5:UMT5EncoderModel"
SECOND = TextEncoderPart(model=UMT5, encoder="text_encoder_2", tokenizer="tokenizer_2")
PARTS = (TextEncoderPart(model=UMT5), SECOND)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = wan_variants.template(tmp_path_factory.mktemp("encoders") / "pipeline")
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(folder / name, folder / f"{name}_2")
    return folder


@pytest.fixture
def folder(template, tmp_path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "pipeline"))


def encoders_of(folder: Path, *, settings=MappingProxyType({"text_encoder.length": 8})):
    return TextEncoders(str(folder), PARTS, settings=settings, device=torch.device("cpu"))


def test_all_stay_loaded_within_and_none_outside(folder, monkeypatch):
    loaded: list[weakref.ref[torch.nn.Module]] = []
    real = components.load_encoder

    def load(*args):
        encoder = real(*args)
        loaded.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(components, "load_encoder", load)
    encoders = encoders_of(folder)

    def use(*names: str) -> None:
        for name in names:
            with encoders.loaded(name) as part:
                tokens = part.tokenizer(["seven"], return_tensors="pt")
                part.encoder(tokens.input_ids)

    use("text_encoder")
    gc.collect()
    assert [encoder() for encoder in loaded] == [None]
    with encoders.keep_loaded(), encoders.keep_loaded():
        use("text_encoder", "text_encoder_2", "text_encoder", "text_encoder_2")
        assert len(loaded) == 3
        assert all(encoder() is not None for encoder in loaded[1:])
    gc.collect()
    assert [encoder() for encoder in loaded] == [None] * 3


def test_a_fingerprint_is_of_all_encoders_and_settings(folder):
    first = encoders_of(folder).fingerprint()
    assert first["text_encoder.length"] == "8"
    assert encoders_of(folder).fingerprint() == first
    longer = encoders_of(folder, settings={"text_encoder.length": 9}).fingerprint()
    differ = {name for name in first if longer[name] != first[name]}
    assert differ == {"text_encoder.length", "encoder"}
    config = folder / "text_encoder_2" / "config.json"
    config.write_text(config.read_text().replace('"num_heads": 2', '"num_heads": 1'))
    other = encoders_of(folder).fingerprint()
    differ = {name for name in first if other[name] != first[name]}
    assert differ == {"text_encoder_2.config.num_heads", "encoder"}
    shutil.rmtree(folder / "tokenizer_2")
    assert encoders_of(folder).fingerprint() == {}


@pytest.mark.parametrize("stated", ["as text", 10**30, 0, True])
def test_a_length_that_is_none_is_refused(folder, stated):
    """It is the tokenizer's own, where a caller gives none."""
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": stated}))
    with pytest.raises(WeightsError, match=r"length of a prompt, at most 100,000; its model_max"):
        encoders_of(folder).outputs("text_encoder", ["seven"])
    encoders_of(folder).outputs("text_encoder", ["seven"], length=4)


def test_an_encoder_that_is_missing_or_wrong_is_refused(folder):
    def check(encoder: torch.nn.Module, where: Path) -> None:
        raise WeightsError(f"{where.name} encodes wrongly")

    part = TextEncoderPart(model=UMT5, check=check)
    checked = TextEncoders(str(folder), [part], device=torch.device("cpu"))
    with pytest.raises(WeightsError, match="text_encoder encodes wrongly"), checked.loaded():
        pass
    (folder / "text_encoder_2" / "model.safetensors").unlink()
    with (
        pytest.raises(WeightsError, match=r"text_encoder_2.*store the embeddings"),
        encoders_of(folder).loaded("text_encoder_2"),
    ):
        pass
