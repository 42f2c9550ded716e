"""Wan's real sizes on the meta device: adapter and planner. No weight is read.

Their names in exports are those of ``test_original_names``.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from distill_adapters_wan import PLUGIN, PUBLISHED, WanAdapter, WanPipelineConfig
from distill_protocols import Condition, LoraSpec, ModelBundle, RoleHandle, RoleSpec
from slow_cases import slow_but

EXPECTED = {
    # hub id: parameters of one transformer, and where the number is published.
    # metadata.total_size of the repository's weight index, in bytes / 4 (fp32): 5,675,987,200.
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1_418_996_800,
    # 57,153,966,336 bytes / 4.
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": 14_288_491_584,
    # Comfy-Org's files: 32.8 GB in bf16, 16.4 GB in fp8; the exact count is the formula below.
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": 16_394_878_784,
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": 16_394_878_784,
    # 480P's, and positions of 514 tokens of width 1280; no file was read.
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": 16_395_536_704,
    # 57,153,966,336 bytes / 4 for either expert.
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": 14_288_491_584,
    # 1095 tensors of either expert's shards, counted.
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": 14_288_901_184,
    # 19,999,150,848 bytes / 4, 825 tensors.
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 4_999_787_712,
}
SIZES = {
    # (frames, height, width): the clip that each was published for.
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": (81, 720, 1280),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": (121, 704, 1280),
}
EVERY = pytest.mark.parametrize("hub_id", PUBLISHED)


def config_of(hub_id):
    frames, height, width = SIZES.get(hub_id, (81, 480, 832))
    return WanPipelineConfig(num_frames=frames, height=height, width=width)


def role_of(hub_id, **given):
    return RoleSpec(name="student", path=hub_id, trainable=True, **given)


def count_parameters(d, f, layers, taken, given, image, positions):
    """Count parameters of a Wan transformer of width d, FFN f, text 4096, frequencies 256."""
    linear = lambda i, o: i * o + o  # noqa: E731
    attention = 4 * linear(d, d) + 2 * d  # q, k, v, out; two norms over all heads
    block = 2 * attention + linear(d, f) + linear(f, d) + 2 * d + 6 * d
    block += (2 * linear(d, d) + d) if image else 0
    head = linear(4096, d) + linear(d, d) + linear(256, d) + linear(d, d) + linear(d, 6 * d)
    if image:
        head += positions * 1280 + 2 * 1280 + linear(1280, 1280) + linear(1280, d) + 2 * d
    ends = taken * 4 * d + d + linear(d, given * 4) + 2 * d
    return layers * block + head + ends


@EVERY
def test_parameter_counts(hub_id):
    plan = PLUGIN.plan(role_of(hub_id), config_of(hub_id))
    experts = ("transformer", "transformer_2") if "A14B" in hub_id else ("transformer",)
    assert tuple(module.name for module in plan.modules) == experts
    assert [module.parameters for module in plan.modules] == [EXPECTED[hub_id]] * len(experts)
    numbers = PUBLISHED[hub_id].transformers["transformer"]
    assert EXPECTED[hub_id] == count_parameters(
        128 * numbers["num_attention_heads"],
        numbers["ffn_dim"],
        numbers["num_layers"],
        numbers["in_channels"],
        numbers["out_channels"],
        numbers.get("image_dim"),
        numbers.get("pos_embed_seq_len") or 0,
    )
    assert not list(PLUGIN.role_problems(role_of(hub_id), config_of(hub_id)))
    adapters = PLUGIN.plan(role_of(hub_id, lora=LoraSpec(rank=32)), config_of(hub_id))
    assert all(module.adapters > 1e6 for module in adapters.modules)


@pytest.fixture(scope="module")
def on_meta(tmp_path_factory):
    """(adapter, role) of one published model: modules on meta, a VAE's configuration on disk."""

    def make(hub_id):
        model = PLUGIN.describe(hub_id)
        with torch.device("meta"):
            modules = {
                name: WanTransformer3DModel.from_config(dict(numbers))
                for name, numbers in model.transformers.items()
            }
        role = RoleHandle(name="student", modules=modules, call_options=model.call_options)
        latents = PUBLISHED[hub_id].latents
        folder = tmp_path_factory.mktemp("published")
        (folder / "vae").mkdir()
        vae = {
            "z_dim": latents.channels, "scale_factor_temporal": latents.stride_t,
            "scale_factor_spatial": latents.stride_hw, "latents_mean": [0.0] * latents.channels,
            "latents_std": [1.0] * latents.channels,
        }  # fmt: skip
        (folder / "vae/config.json").write_text(json.dumps(vae))
        bundle = ModelBundle({"student": role})
        return WanAdapter(bundle, PLUGIN, config_of(hub_id), source=str(folder)), role

    return make


LATENTS = {
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": (16, 21, 90, 160),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": (48, 31, 44, 80),
}


@torch.no_grad()
@pytest.mark.parametrize(
    "hub_id",
    slow_but(
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.2-I2V-A14B-Diffusers"),
        [name for name in PUBLISHED if "I2V-14B-480P" not in name],
    ),
)
def test_a_call_of_the_real_size(hub_id, on_meta):
    """Shapes through the whole model, the condition's, and the expert of either side."""
    adapter, role = on_meta(hub_id)
    shape = LATENTS.get(hub_id, (16, 21, 60, 104))
    assert adapter.latent_shape == shape
    assert PLUGIN.latent_shape(config_of(hub_id), source=hub_id) == shape
    expected = PLUGIN.condition_shapes(config_of(hub_id), source=hub_id)
    assert expected["text"] == (512, 4096)
    reads_pictures = "Wan2.1-I2V" in hub_id or "FLF2V" in hub_id
    assert ("image_latents" in expected) == (reads_pictures or "Wan2.2-I2V" in hub_id)
    assert ("image_embeds" in expected) == reads_pictures
    with torch.device("meta"):
        cond = {name: torch.empty(1, *size) for name, size in expected.items()}
        x_t = torch.empty(1, *shape)
        first = torch.empty(1, shape[0], 1, *shape[2:])
    tokens, calls, hooks = math.prod(shape[1:]) // 4, [], []
    for name, module in role.modules.items():
        note = lambda _, args, given, name=name: calls.append((name, given))  # noqa: E731
        hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    for t in (950.0, 100.0)[: len(role.modules)]:
        v = adapter.forward("student", x_t, torch.tensor([t]), Condition(cond))
        assert v.shape == x_t.shape
        assert v.is_meta
    assert [name for name, _ in calls] == list(role.modules)
    given = calls[0][1]["hidden_states"]
    assert given.shape[1] == PUBLISHED[hub_id].transformers["transformer"]["in_channels"]
    if PUBLISHED[hub_id].call_options.get("expand_timesteps"):
        pictured = Condition({**cond, "image_latents": first})
        v = adapter.forward("student", x_t, torch.tensor([500.0]), pictured)
        assert v.shape == x_t.shape
        assert calls[-1][1]["timestep"].shape == (1, tokens)
    assert adapter.expert_ranges("student") == {
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers": ((0, 875), (875, 1000)),
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers": ((0, 900), (900, 1000)),
    }.get(hub_id, ((0, 1000),))
