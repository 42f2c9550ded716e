"""LTX's real sizes on the meta device, and the names of its weights. No weight is read."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from diffusers.loaders.single_file_utils import convert_ltx_transformer_checkpoint_to_diffusers
from distill_adapters_ltx import PUBLISHED
from distill_adapters_ltx.original_names import to_diffusers, to_original
from distill_adapters_ltx.published import LATENT_CHANNELS
from safetensors.torch import load_file, save_file

EVERY = pytest.mark.parametrize("hub_id", PUBLISHED)
# What the hub calls 1.92B and 13B.
PARAMETERS = {28: 1_923_385_472, 48: 13_042_569_344}


def architecture(hub_id):
    return PUBLISHED[hub_id].transformers["transformer"]


@functools.cache
def shapes(hub_id):
    with torch.device("meta"):
        transformer = LTXVideoTransformer3DModel(**architecture(hub_id))
    return {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}


def by_hand(width, layers, taken, text):
    """Weights and biases of an LTX transformer: FFN of four widths, 256 frequencies."""
    linear = lambda i, o: i * o + o  # noqa: E731
    attention = 4 * linear(width, width) + 2 * width  # q, k, v, out; two norms over all heads
    block = 2 * attention + linear(width, 4 * width) + linear(4 * width, width) + 6 * width
    time = linear(256, width) + linear(width, width) + linear(width, 6 * width)
    captions = linear(text, width) + linear(width, width)
    ends = linear(taken, width) + linear(width, taken) + 2 * width
    return layers * block + time + captions + ends


@EVERY
def test_parameter_counts(hub_id):
    config = architecture(hub_id)
    counted = sum(torch.Size(shape).numel() for shape in shapes(hub_id).values())
    assert counted == PARAMETERS[config["num_layers"]]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    assert width == config["cross_attention_dim"]  # captions are projected to the width first
    assert counted == by_hand(width, config["num_layers"], LATENT_CHANNELS, 4096)


def test_the_2b_model_is_diffusers_default():
    assert shapes("Lightricks/LTX-Video") == {
        name: tuple(tensor.shape) for name, tensor in default().items()
    }


def default():
    with torch.device("meta"):
        return LTXVideoTransformer3DModel().state_dict()


@EVERY
def test_original_names_are_those_that_diffusers_converts(hub_id):
    ours = list(shapes(hub_id))
    original = [to_original(name) for name in ours]
    assert [to_diffusers(name) for name in original] == ours
    assert len(set(original)) == len(ours)
    # By position, so that two names that changed places are seen.
    converted = convert_ltx_transformer_checkpoint_to_diffusers(
        dict(zip(original, ours, strict=True))
    )
    assert all(name == ours_name for name, ours_name in converted.items())
    assert to_original("proj_in.weight") == "patchify_proj.weight"
    block = "transformer_blocks.3.attn2"
    assert to_original(f"{block}.norm_k.weight") == f"{block}.k_norm.weight"


def test_linear_layers_of_blocks_have_one_name():
    """ComfyUI and diffusers therefore read the same LoRA under different prefixes."""
    for name in shapes("Lightricks/LTX-Video"):
        if name.startswith("transformer_blocks.") and ".norm_" not in name:
            assert to_original(name) == name


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_is_read_with_the_folder_of_the_transformer(folder_of, tmp_path, prefix):
    """Without ``config`` diffusers would ask the hub for the 2B model's."""
    folder = folder_of("0.9.0") / "transformer"
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    file = tmp_path / "ltx.safetensors"
    save_file({prefix + to_original(name): tensor for name, tensor in weights.items()}, file)
    read = LTXVideoTransformer3DModel.from_single_file(str(file), config=str(folder)).state_dict()
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model."])
def test_a_lora_is_read_under_either_prefix(stock, tmp_path, prefix):
    pipeline, draw = stock(), torch.Generator().manual_seed(0)
    layers = {
        name: (
            torch.randn(2, module.in_features, generator=draw),
            torch.randn(module.out_features, 2, generator=draw),
        )
        for name, module in pipeline.transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("transformer_blocks.")
    }
    assert len(layers) == 2 * 10  # to_q, to_k, to_v, to_out.0 twice; ff.net.0.proj, ff.net.2
    file = {
        f"{prefix}{to_original(name)}.lora_{side}.weight": factor
        for name, pair in layers.items()
        for side, factor in zip("AB", pair, strict=True)
    }
    save_file(file, tmp_path / "lora.safetensors")
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    held = pipeline.transformer.state_dict()
    for name, pair in layers.items():
        for side, factor in zip("AB", pair, strict=True):
            assert torch.equal(held[f"{name}.lora_{side}.default_0.weight"], factor)
