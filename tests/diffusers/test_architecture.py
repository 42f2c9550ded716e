"""Blocks, layers and widths of model classes, read off the meta device."""

from __future__ import annotations

import pytest
from distill_diffusers.architecture import inspect_model, patch_size
from distill_diffusers.kinds import ModelKind
from distill_diffusers.lora import adapted_layers, target_problems
from distill_protocols import LoraSpec, WeightsError
from other_kinds import LTX, LTX_CONFIG

CLASSES = {
    "transformer_wan:WanTransformer3DModel": (("blocks",), (1, 2, 2)),
    "transformer_ltx:LTXVideoTransformer3DModel": (("transformer_blocks",), (1, 1, 1)),
    "transformer_sd3:SD3Transformer2DModel": (("transformer_blocks",), (1, 2, 2)),
    "transformer_flux:FluxTransformer2DModel": (
        ("transformer_blocks", "single_transformer_blocks"),
        (1, 1, 1),
    ),
    "transformer_hunyuan_video:HunyuanVideoTransformer3DModel": (
        ("transformer_blocks", "single_transformer_blocks"),
        (1, 2, 2),
    ),
    "cogvideox_transformer_3d:CogVideoXTransformer3DModel": (("transformer_blocks",), (1, 2, 2)),
}


def kind_of(name: str, **options) -> ModelKind:
    return ModelKind(
        transformer=f"diffusers.models.transformers.{name}",
        vae="",
        pipelines=(),
        stored_like="",
        **options,
    )


@pytest.mark.parametrize("name", CLASSES)
def test_blocks_and_width_of_a_class_are_found(name):
    lists, patch = CLASSES[name]
    config = {"num_layers": 2}
    if len(lists) == 2:
        config["num_single_layers"] = 3
    architecture = inspect_model(kind_of(name), config)
    assert architecture.block_lists == lists
    assert len(architecture.blocks) == sum(config.values())
    assert architecture.blocks[:2] == (f"{lists[0]}.0", f"{lists[0]}.1")
    full = architecture.config
    assert architecture.width == full["num_attention_heads"] * full["attention_head_dim"]
    assert patch_size(full) == patch


def test_adapters_are_on_all_linear_layers_of_blocks_unless_the_kind_or_the_role_says_which():
    name = "transformer_sd3:SD3Transformer2DModel"
    everything = inspect_model(kind_of(name), {"num_layers": 2})
    layers = adapted_layers(everything, LoraSpec(rank=1))
    assert list(layers) == [n for n in everything.linear_layers if n.startswith("transformer_b")]
    chosen = inspect_model(kind_of(name, lora_targets=("to_q", "proj_out")), {"num_layers": 2})
    layers = adapted_layers(chosen, LoraSpec(rank=1))
    assert list(layers) == [*(f"transformer_blocks.{i}.attn.to_q" for i in (0, 1)), "proj_out"]
    assert layers["proj_out"] == (1152, 64)
    (only,) = adapted_layers(chosen, LoraSpec(rank=1, target_modules=("context_embedder",)))
    assert only == "context_embedder"


def test_a_target_of_another_name_gets_a_hint():
    architecture = inspect_model(LTX, LTX_CONFIG)
    first, second = target_problems(
        architecture, LoraSpec(rank=1, target_modules=("q", "ff.net")), LTX.foreign_layers
    )
    assert "diffusers calls it 'to_q'" in first
    assert "attn1.to_q" in first
    assert "transformer_blocks" not in first  # each kind of layer once, without its number
    assert "did you mean 'ff.net.2'" in second or "did you mean 'net.2'" in second


def test_a_configuration_of_another_class_is_refused():
    with pytest.raises(WeightsError, match="builds no LTXVideoTransformer3DModel"):
        inspect_model(LTX, {**LTX_CONFIG, "num_layers": "four"})


def test_one_configuration_is_built_once():
    first = inspect_model(LTX, LTX_CONFIG)
    assert inspect_model(LTX, dict(reversed(LTX_CONFIG.items()))) is first
    assert inspect_model(LTX, {**LTX_CONFIG, "num_layers": 3}) is not first
