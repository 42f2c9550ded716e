"""Every parameter of every published Wan has, under the original names, its place and shape.

``original_wan_names.json`` was built from the original code, as it describes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distill_adapters_wan import PUBLISHED
from distill_adapters_wan.names.original import to_diffusers, to_original
from distill_protocols import WeightsError

ORIGINAL = json.loads((Path(__file__).parent / "original_wan_names.json").read_text())["models"]
MODELS = sorted(ORIGINAL)


def original_shapes(model):
    """name -> shape, the blocks written out."""
    entry = ORIGINAL[model]
    return {
        name.format(i=i): tuple(shape)
        for name, shape in entry["names"].items()
        for i in range(entry["layers"] if "{i}" in name else 1)
    }


def diffusers_shapes(config):
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    with torch.device("meta"):
        module = WanTransformer3DModel(**config)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_all_published_models_are_among_them():
    same = {
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",  # as 480P: another training, one architecture
        "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",  # beside 480P's it has positions of the pictures
    }
    assert set(PUBLISHED) - set(ORIGINAL) == same


@pytest.mark.parametrize("model", MODELS)
def test_every_name_and_shape_is_that_of_the_original_code(model):
    original = original_shapes(model)
    for config in PUBLISHED[model].transformers.values():
        ours = diffusers_shapes(config)
        assert {to_original(name): shape for name, shape in ours.items()} == original
        assert {to_diffusers(name): shape for name, shape in original.items()} == ours
        assert len(ours) == len(original)


@pytest.mark.parametrize("model", MODELS)
def test_diffusers_own_conversion_agrees(model):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    # By position, so that two names that changed places are seen.
    names = list(original_shapes(model))
    converted = convert_wan_transformer_to_diffusers(dict(zip(names, names, strict=True)))
    assert {name: to_original(name) for name in converted} == converted


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attn3.to_q.weight",
        "blocks.0.attn1.to_q",  # a module, not a parameter
        "blocks.0.attn1.to_q.lora_A.weight",
        "blocks.0.scale_shift_table.weight",
        "blocks.x.attn1.to_q.weight",
        "attn1.to_q.weight",
        "patch_embedding",
        "vae.conv.weight",
    ],
)
def test_a_foreign_name_is_refused(name):
    with pytest.raises(WeightsError, match="no parameter"):
        to_original(name)


def test_unknown_original_names_are_refused():
    with pytest.raises(WeightsError, match=r"blocks\.0\.self_attn\.q"):
        to_original("blocks.0.self_attn.q.weight")
    with pytest.raises(WeightsError, match="WanModel"):
        to_diffusers("blocks.0.attn1.to_q.weight")
