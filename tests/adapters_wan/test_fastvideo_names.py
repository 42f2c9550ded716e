"""Every name has one image and comes back; the images are those of FastVideo's own model."""

from __future__ import annotations

import re

import pytest
from distill_adapters_wan.names.fastvideo import (
    from_diffusers,
    is_diffusers,
    migrated,
    missing,
    to_diffusers,
    unused,
)
from distill_adapters_wan.names.original import to_original
from distill_adapters_wan.published import PUBLISHED
from hypothesis import given
from hypothesis import strategies as st

TINY = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 3,
}  # fmt: skip
CONFIGS = {
    "tiny": TINY,
    "tiny image": {**TINY, "image_dim": 24, "added_kv_proj_dim": 24},
}
for _name, _model in PUBLISHED.items():
    for _config in _model.transformers.values():
        # FastVideo has no model of first and last frames, whose pictures have positions.
        if _config not in CONFIGS.values() and "pos_embed_seq_len" not in _config:
            CONFIGS[_name] = _config


def words(text: str) -> list[str]:
    return text.split()


# The state_dict of FastVideo's WanTransformer3DModel (its module code, run): one block, the rest.
BLOCK = words("""
attn2.norm_k.weight attn2.norm_q.weight attn2.to_k.bias attn2.to_k.weight attn2.to_out.bias
attn2.to_out.weight attn2.to_q.bias attn2.to_q.weight attn2.to_v.bias attn2.to_v.weight
ffn.fc_in.bias ffn.fc_in.weight ffn.fc_out.bias ffn.fc_out.weight norm_k.weight norm_q.weight
scale_shift_table self_attn_residual_norm.norm.bias self_attn_residual_norm.norm.weight
to_k.bias to_k.weight to_out.bias to_out.weight to_q.bias to_q.weight to_v.bias to_v.weight
""")
TOP = words("""
condition_embedder.text_embedder.fc_in.bias condition_embedder.text_embedder.fc_in.weight
condition_embedder.text_embedder.fc_out.bias condition_embedder.text_embedder.fc_out.weight
condition_embedder.time_embedder.mlp.fc_in.bias
condition_embedder.time_embedder.mlp.fc_in.weight
condition_embedder.time_embedder.mlp.fc_out.bias
condition_embedder.time_embedder.mlp.fc_out.weight
condition_embedder.time_modulation.linear.bias condition_embedder.time_modulation.linear.weight
patch_embedding.proj.bias patch_embedding.proj.weight proj_out.bias proj_out.weight
scale_shift_table
""")
IMAGE_BLOCK = words("""
attn2.add_k_proj.bias attn2.add_k_proj.weight attn2.add_v_proj.bias attn2.add_v_proj.weight
attn2.norm_added_k.weight attn2.norm_added_q.weight
""")
IMAGE_TOP = words("""
condition_embedder.image_embedder.ff.fc_in.bias
condition_embedder.image_embedder.ff.fc_in.weight
condition_embedder.image_embedder.ff.fc_out.bias
condition_embedder.image_embedder.ff.fc_out.weight condition_embedder.image_embedder.norm1.bias
condition_embedder.image_embedder.norm1.weight condition_embedder.image_embedder.norm2.bias
condition_embedder.image_embedder.norm2.weight
""")


def diffusers_names(config) -> set[str]:
    from accelerate import init_empty_weights
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    with init_empty_weights():
        return set(WanTransformer3DModel(**config).state_dict())


def fastvideo_names(config) -> set[str]:
    image = "image_dim" in config
    block, top = BLOCK + IMAGE_BLOCK * image, TOP + IMAGE_TOP * image
    return {f"blocks.{i}.{n}" for i in range(config["num_layers"]) for n in block} | set(top)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_name_has_one_image_which_is_fastvideos(config):
    ours, theirs = diffusers_names(config), fastvideo_names(config)
    images = [from_diffusers(name) for name in ours]
    assert set(images) == {name for name in theirs if not unused(name)}
    assert len(set(images)) == len(ours)
    assert [to_diffusers(image) for image in images] == list(ours)
    assert missing(ours) == []


@pytest.mark.parametrize("config", [CONFIGS["tiny"], CONFIGS["tiny image"]])
def test_a_name_of_both_means_the_same_in_both(config):
    ours, theirs = diffusers_names(config), fastvideo_names(config)
    for name in ours & theirs:
        assert from_diffusers(name) == name
    for name in theirs - ours:
        assert not is_diffusers(name)


def test_only_the_added_query_norm_is_unused():
    config = CONFIGS["tiny image"]
    ours = diffusers_names(config)
    assert [n for n in fastvideo_names(config) if unused(n)] == [
        n for n in fastvideo_names(config) if to_diffusers(n) is None
    ]
    assert not any(unused(name) for name in ours)


@given(st.data())
def test_wrappers_and_prefix_are_taken_out(data):
    names = sorted(fastvideo_names(TINY))
    parts = data.draw(st.sampled_from(names)).split(".")
    wrapper = st.sampled_from(["_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"])
    wrapped = []
    for part in parts[:-1]:
        wrapped += [part, *data.draw(st.lists(wrapper, max_size=2))]
    prefix = data.draw(st.sampled_from(["", "model.", "model._fsdp_wrapped_module."]))
    assert migrated(prefix + ".".join([*wrapped, parts[-1]])) == to_diffusers(".".join(parts))


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.to_gate_compress.weight",
        "condition_embedder.delta_embedder.mlp.fc_in.weight",
        "blocks.0.to_q.lora_A",
        "blocks.0.to_q.base_layer.weight",
        "blocks.x.to_q.weight",
        "to_q.weight",
        "blocks.0.patch_embedding.proj.weight",
        "blocks.0.scale_shift_table.weight",
        "",
    ],
)
def test_names_that_wan_does_not_have_are_unknown(name):
    assert migrated(name) is None
    assert not unused(name)


@pytest.mark.parametrize("name", sorted(fastvideo_names(CONFIGS["tiny image"])))
def test_original_names_map_back_to_diffusers(name):
    ours = to_diffusers(name)
    if ours is None:
        return
    assert migrated(f"model.{to_original(ours)}") == ours
    assert migrated(name) == ours
    assert migrated(ours) == ours


# What FastVideo's own mapping (its configuration, run) makes of Diffusers' names, if not the same.
PAIRS = words("""
blocks.0.attn1.norm_k blocks.0.norm_k
blocks.0.attn1.norm_q blocks.0.norm_q
blocks.0.attn1.to_k blocks.0.to_k
blocks.0.attn1.to_out.0 blocks.0.to_out
blocks.0.attn1.to_q blocks.0.to_q
blocks.0.attn1.to_v blocks.0.to_v
blocks.0.attn2.to_out.0 blocks.0.attn2.to_out
blocks.0.ffn.net.0.proj blocks.0.ffn.fc_in
blocks.0.ffn.net.2 blocks.0.ffn.fc_out
blocks.0.norm2 blocks.0.self_attn_residual_norm.norm
condition_embedder.image_embedder.ff.net.0.proj condition_embedder.image_embedder.ff.fc_in
condition_embedder.image_embedder.ff.net.2 condition_embedder.image_embedder.ff.fc_out
condition_embedder.text_embedder.linear_1 condition_embedder.text_embedder.fc_in
condition_embedder.text_embedder.linear_2 condition_embedder.text_embedder.fc_out
condition_embedder.time_embedder.linear_1 condition_embedder.time_embedder.mlp.fc_in
condition_embedder.time_embedder.linear_2 condition_embedder.time_embedder.mlp.fc_out
condition_embedder.time_proj condition_embedder.time_modulation.linear
patch_embedding patch_embedding.proj
""")


def test_each_name_stands_for_the_same_weight():
    """Sets of names that agree may still be paired wrongly."""
    pairs = dict(zip(PAIRS[::2], PAIRS[1::2], strict=True))
    for ours, theirs in pairs.items():
        assert to_diffusers(f"{theirs}.weight") == f"{ours}.weight"
    for name in diffusers_names(CONFIGS["tiny image"]):
        in_first = re.sub(r"^blocks\.\d+\.", "blocks.0.", name)
        if in_first.rpartition(".")[0] not in pairs:
            assert from_diffusers(name) == name


@given(st.data())
def test_any_missing_weight_is_named(data):
    config = data.draw(st.sampled_from([CONFIGS["tiny"], CONFIGS["tiny image"]]))
    names = sorted(diffusers_names(config))
    lost = data.draw(st.sampled_from(names))
    assert lost in missing(set(names) - {lost})
