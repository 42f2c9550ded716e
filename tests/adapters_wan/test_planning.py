"""Plans against what they stand for: the loaded modules, and calls that really happen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from distill_adapters_wan import PLUGIN, WAN, WanPipelineConfig, adapter
from distill_adapters_wan.calling import call_transformer
from distill_diffusers.planning.calls import measure_call, plan_call
from distill_protocols import Condition, FsdpPolicy, LoraSpec, RoleHandle, RoleSpec, WeightsError
from slow_cases import slow_but
from torch import Tensor
from wan_variants import VARIANTS

KINDS: dict[str, dict[str, Any]] = {
    "trained": {},
    "trained in bf16": {"precision": "bf16"},
    "frozen in bf16": {"trainable": False, "precision": "bf16"},
    "LoRA": {"lora": LoraSpec(rank=3)},
    "LoRA in bf16": {"lora": LoraSpec(rank=3), "precision": "bf16"},
    "checkpointed": {"activation_checkpointing": True},
    "checkpointed in bf16": {"activation_checkpointing": True, "precision": "bf16"},
}
CLIP = WanPipelineConfig(num_frames=5, height=32, width=32, max_sequence_length=8)


@pytest.fixture(scope="module")
def folder(pipeline_template, tmp_path_factory) -> Path:
    """Write the tiny pipeline with a larger transformer: plans measure two and three blocks."""
    path = tmp_path_factory.mktemp("larger") / "pipeline"
    shutil.copytree(pipeline_template, path)
    config = json.loads((path / "transformer" / "config.json").read_text())
    config |= {"num_attention_heads": 6, "num_layers": 5, "ffn_dim": 300}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        WanTransformer3DModel.from_config(config).save_pretrained(path / "transformer")
    return path


def role(folder: Path, kind: str) -> RoleSpec:
    return attrs.evolve(RoleSpec(name="student", path=str(folder), trainable=True), **KINDS[kind])


def loaded(spec: RoleSpec) -> RoleHandle:
    handle = PLUGIN.load([spec], CLIP, device=torch.device("cpu"))["student"]
    if spec.activation_checkpointing:
        handle.modules["transformer"].enable_gradient_checkpointing()
    return handle


def inputs(spec: RoleSpec, batch: int) -> dict[str, Tensor]:
    latents = PLUGIN.latent_shape(CLIP, source=spec.path)
    text = PLUGIN.condition_shapes(CLIP, source=spec.path)["text"]
    assert latents is not None
    return {
        "latents": torch.randn(batch, *latents),
        "t": torch.ones(batch),
        "text": torch.randn(batch, *text),
    }


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_plan_has_each_tensor_that_is_loaded(folder, kind):
    spec = role(folder, kind)
    (plan,) = PLUGIN.plan(spec, CLIP).modules
    handle = loaded(spec)
    module = handle.modules["transformer"]
    loaded_tensors = {
        name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in module.named_parameters()
    }
    assert {t.name: (t.shape, t.dtype, t.trained) for t in plan.tensors} == loaded_tensors
    assert len(plan.tensors) == len(loaded_tensors)
    assert plan.buffer_bytes == sum(b.nbytes for b in module.buffers())
    for tensor in plan.tensors:
        block = ".".join(tensor.name.split(".")[:2]) if tensor.name.startswith("blocks.") else None
        assert tensor.block == block


@pytest.mark.parametrize(
    "kind", slow_but(("trained", "checkpointed in bf16", "LoRA in bf16"), KINDS)
)
def test_a_call_takes_what_is_planned(folder, kind):
    """Fake tensors, two and three blocks, against real ones and all blocks."""
    spec = role(folder, kind)
    plan = PLUGIN.plan_call(spec, CLIP, source=spec.path, batch=3)
    assert plan is not None
    measured = measure_call(loaded(spec), PLUGIN.call_model, inputs(spec, 3))
    assert plan.most == pytest.approx(measured.most, rel=0.02)
    assert plan.held == pytest.approx(measured.held if spec.trainable else 0, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_call_that_a_discriminator_reads_takes_what_is_planned(
    pipeline_template, checkpointing
):
    """Differentiated by its latents alone."""
    spec = RoleSpec(
        name="student", path=str(pipeline_template), trainable=False, precision="bf16",
        activation_checkpointing=checkpointing,
    )  # fmt: skip
    plan = PLUGIN.plan_call(spec, CLIP, source=spec.path, batch=3, input_gradient=True)
    values = inputs(spec, 3)
    values["latents"].requires_grad_()
    measured = measure_call(loaded(spec), PLUGIN.call_model, values)
    assert plan.most == pytest.approx(measured.most, rel=0.02)
    assert plan.held == 0
    assert plan.most > PLUGIN.plan_call(spec, CLIP, source=spec.path, batch=3).most


@pytest.mark.parametrize("name", slow_but(("flf2v", "i2v-experts", "ti2v"), VARIANTS))
def test_a_call_of_every_variant_takes_what_is_planned(name, folder_of, monkeypatch):
    """Of what the adapter really gives its model: channels, embeddings, a time for each token."""
    config, path = VARIANTS[name].config, folder_of(name)
    spec = RoleSpec(name="student", path=path, trainable=True)
    plan = PLUGIN.plan_call(spec, config, source=path, batch=2)
    assert plan is not None
    bundle = PLUGIN.load([spec], config, device=torch.device("cpu"))
    wan = PLUGIN.adapter(bundle, config, source=path)
    calls: list[tuple[Any, ...]] = []

    def call(role: RoleHandle, *given: Any, **options: Any) -> Tensor:
        calls.append(given)
        return call_transformer(role, *given, **options)

    monkeypatch.setattr(adapter, "call_transformer", call)
    cond = Condition({"text": torch.randn(2, config.max_sequence_length, 16)})
    if VARIANTS[name].image:
        first, last = torch.rand(2, 2, 3, config.height, config.width)
        cond = wan.with_image(cond, first, last=last if VARIANTS[name].pair else None)
    wan.forward("student", torch.randn(2, *wan.latent_shape), torch.full((2,), 950.0), cond)
    ((hidden, times, text, image),) = calls
    values = {"latents": hidden, "t": times, "text": text}
    measured = measure_call(
        bundle["student"],
        lambda role, x: call_transformer(role, x["latents"], x["t"], x["text"], x.get("image")),
        values if image is None else {**values, "image": image},
    )
    assert plan.most == pytest.approx(measured.most, rel=0.02)
    assert plan.held == pytest.approx(measured.held, rel=0.02)


@pytest.mark.parametrize(
    "kind", slow_but(("trained in bf16",), ("trained", "trained in bf16", "LoRA"))
)
def test_planned_activations_are_those_that_autograd_saved(folder, kind):
    """By another way of counting: autograd's own hooks, in a real call."""
    spec = role(folder, kind)
    plan = PLUGIN.plan_call(spec, CLIP, source=spec.path, batch=2)
    assert plan is not None
    handle, values = loaded(spec), inputs(spec, 2)
    module = handle.modules["transformer"]
    known = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    known |= {value.untyped_storage().data_ptr() for value in values.values()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = PLUGIN.call_model(handle, values).float().square().mean()
    assert plan.held == pytest.approx(sum(saved.values()), rel=0.03)
    del loss


def test_attention_needs_no_matrix_of_tokens_by_tokens(folder):
    spec = role(folder, "trained")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    rest = {"t": (1,), "text": (1, 8, 16)}
    short, long = (
        plan_call(WAN, config, spec, PLUGIN.call_model, {"latents": (1, 4, 2, n, n), **rest})
        for n in (8, 32)
    )
    assert long.held < 16.5 * short.held  # sixteen times the tokens, not their square


def test_a_guided_call_is_of_twice_the_clips(folder):
    spec = role(folder, "frozen in bf16")

    def most(config: WanPipelineConfig, batch: int, guided: bool) -> int:
        plan = PLUGIN.plan_call(spec, config, source=spec.path, batch=batch, guided=guided)
        assert plan is not None
        return plan.most

    assert most(CLIP, 2, True) == most(CLIP, 4, False) > most(CLIP, 2, False)
    apart = attrs.evolve(CLIP, cfg_batched=False)
    assert most(apart, 2, True) == most(CLIP, 2, False)


def test_blocks_of_a_policy(folder):
    spec = role(folder, "trained")
    inner = attrs.evolve(spec, fsdp=FsdpPolicy(blocks=("blocks", "blocks.0.ffn.net")))
    (plan,) = PLUGIN.plan(inner, CLIP).modules
    blocks = {t.name: t.block for t in plan.tensors}
    assert blocks["blocks.0.ffn.net.2.weight"] == "blocks.0.ffn.net.2"
    assert blocks["blocks.1.ffn.net.2.weight"] == "blocks.1"
    assert blocks["patch_embedding.weight"] is None
    with pytest.raises(WeightsError, match="no module list layers in this model"):
        PLUGIN.plan(attrs.evolve(spec, fsdp=FsdpPolicy(blocks=("layers",))), CLIP)
