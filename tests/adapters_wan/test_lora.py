"""LoRA roles: they start as their base, only adapters train, and their names mean one thing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs
import pytest
import torch
from distill_adapters_wan import PLUGIN, PUBLISHED, WAN
from distill_diffusers.architecture import inspect_model
from distill_diffusers.lora import (
    adapted_layers,
    adapter_names,
    base_name,
    is_adapter,
    merge,
    names_of,
)
from distill_protocols import Condition, LoraSpec, RoleHandle, RoleSpec, TensorWeights, WeightsError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

CPU = torch.device("cpu")
LORA = LoraSpec(rank=2)
ENDS = (*WAN.lora_targets, "attn1.to_q", "blocks.1.ffn.net.2", "time_proj", "linear_1", "proj_out")
specs = st.builds(
    LoraSpec,
    rank=st.integers(1, 6),
    alpha=st.none() | st.floats(0.5, 16, allow_nan=False),
    target_modules=st.lists(st.sampled_from(ENDS), max_size=4, unique=True).map(tuple),
)
precisions = st.sampled_from(["fp32", "bf16", "fp16"])


def role(folder, lora: LoraSpec | None = LORA, **kwargs) -> RoleSpec:
    return RoleSpec(**{"name": "r", "path": str(folder), "trainable": True, "lora": lora, **kwargs})


def load(spec: RoleSpec, config, seed: int = 0, source=None) -> RoleHandle:
    weights = {} if source is None else {spec.name: {"transformer": source}}
    return PLUGIN.load([spec], config, device=CPU, seed=seed, weights=weights)[spec.name]


def module(handle: RoleHandle) -> nn.Module:
    return handle.modules["transformer"]


def randomise(handle: RoleHandle, seed: int = 3) -> None:
    """B away from zero, so that the adapters do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.trained_parameters("transformer").values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def inputs(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, 2, 4, 6, generator=generator)
    t = 1000 * torch.rand(2, generator=generator)
    return x, t, Condition({"text": torch.randn(2, 6, 16, generator=generator)})


def config_of(handle: RoleHandle) -> Mapping:
    return dict(module(handle).config)


@settings(max_examples=10)
@given(lora=specs, precision=precisions)
def test_a_lora_role_starts_as_the_frozen_role(pipeline_template, config, lora, precision):
    lora_role = role(pipeline_template, lora, name="student", precision=precision)
    frozen = role(pipeline_template, None, name="teacher", trainable=False, precision=precision)
    bundle = PLUGIN.load([lora_role, frozen], config, device=CPU)
    adapter = PLUGIN.adapter(bundle, config, source=str(pipeline_template))
    expected = adapter.forward("teacher", *inputs())
    assert expected.std() > 0.01
    assert torch.equal(adapter.forward("student", *inputs()), expected)
    theirs = dict(module(bundle["teacher"]).named_parameters())
    base = {
        base_name(name): parameter
        for name, parameter in module(bundle["student"]).named_parameters()
        if not is_adapter(name)
    }
    assert base.keys() == theirs.keys()
    for name, parameter in base.items():
        assert parameter.dtype == theirs[name].dtype, name
        assert torch.equal(parameter, theirs[name]), name


@settings(max_examples=10)
@given(lora=specs, precision=precisions)
def test_trained_are_the_adapters_and_nothing_else(pipeline_template, config, lora, precision):
    handle = load(role(pipeline_template, lora, precision=precision), config)
    layers = adapted_layers(inspect_model(WAN, config_of(handle)), lora)
    expected = {name for layer in layers for name in names_of(layer)}
    assert handle.trained == {"transformer": expected}
    assert set(handle.moving_state("transformer")) == expected
    trained = handle.trained_parameters("transformer")
    assert {n for n, p in module(handle).named_parameters() if p.requires_grad} == expected
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert sum(p.numel() for p in trained.values()) == sum(
        lora.rank * sum(size) for size in layers.values()
    )
    plan = PLUGIN.plan(role(pipeline_template, lora), config).modules[0]
    assert plan.adapters == sum(p.numel() for p in trained.values())
    assert plan.parameters == sum(
        p.numel() for n, p in module(handle).named_parameters() if n not in expected
    )
    with handle.frozen():
        assert not any(p.requires_grad for p in module(handle).parameters())
    handle.check_training()


@settings(max_examples=10)
@given(lora=specs)
def test_merged_is_what_peft_merges_and_what_the_module_gives(pipeline_template, config, lora):
    handle = load(role(pipeline_template, lora, name="student"), config)
    randomise(handle)
    adapter = PLUGIN.adapter(
        PLUGIN.load([role(pipeline_template, None, name="merged")], config, device=CPU),
        config,
        source=str(pipeline_template),
    )
    adapter._bundle.roles["student"] = handle
    plain = module(adapter._bundle["merged"])
    moving = handle.moving_state("transformer")
    layers = adapter_names(moving)
    with torch.no_grad():
        for layer, (a, b) in layers.items():
            weight = plain.get_submodule(layer).weight
            merged = merge(weight, moving[a], moving[b], lora.scale)
            peft = module(handle).get_submodule(layer)
            assert torch.equal(merged, weight + peft.get_delta_weight("default")), layer
            assert not torch.equal(merged, weight)
            weight.copy_(merged)
        apart = adapter.forward("student", *inputs())
        together = adapter.forward("merged", *inputs())
        assert torch.allclose(apart, together, rtol=1e-4, atol=1e-4 * float(together.abs().max()))
        for layer in layers:
            module(handle).get_submodule(layer).merge(safe_merge=True)
            base = module(handle).get_submodule(f"{layer}.base_layer")
            assert torch.equal(base.weight, plain.get_submodule(layer).weight)


def test_the_start_is_a_function_of_seed_role_and_name(pipeline_template, config):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    lora = LoraSpec(rank=3)
    first = load(role(pipeline_template, lora), config, seed=1).moving_state("transformer")
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    fewer = LoraSpec(rank=3, target_modules=("attn1.to_q", "ffn.net.2"))
    among = PLUGIN.load(
        [role(pipeline_template, lora, name="other"), role(pipeline_template, fewer)],
        config,
        device=CPU,
        seed=1,
    )
    for name, value in among["r"].moving_state("transformer").items():
        assert torch.equal(value, first[name]), name
    other = among["other"].moving_state("transformer")
    reseeded = load(role(pipeline_template, lora), config, seed=2).moving_state("transformer")
    assert other.keys() == first.keys()
    for name, value in first.items():
        if ".lora_B." in name:
            assert not value.any(), name
            continue
        bound = 1 / math.sqrt(value.shape[1])  # kaiming uniform, a = sqrt(5): peft's and Linear's
        assert bound / 2 < value.abs().max() <= bound, name
        assert not torch.equal(value, other[name]), name
        assert not torch.equal(value, reseeded[name]), name
    a = [value for name, value in first.items() if ".lora_A." in name and value.shape[1] == 24]
    assert len({tuple(value.flatten().tolist()) for value in a}) == len(a)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.03)])
def test_gradients_reach_adapters_alone_and_are_those_of_fp32(
    pipeline_template, config, precision, tolerance
):
    """Against the chain rule on merged fp32 weights: dA = s B^T dW, dB = s dW A^T."""
    lora = LoraSpec(rank=4, alpha=2)
    student = role(pipeline_template, lora, name="student", precision=precision)
    plain = role(pipeline_template, None, name="plain")
    bundle = PLUGIN.load([student, plain], config, device=CPU)
    adapter = PLUGIN.adapter(bundle, config, source=str(pipeline_template))
    randomise(bundle["student"])
    moving = bundle["student"].moving_state("transformer")
    layers = adapter_names(moving)
    with torch.no_grad():
        for layer, (a, b) in layers.items():
            weight = module(bundle["plain"]).get_submodule(layer).weight
            weight.copy_(merge(weight, moving[a], moving[b], lora.scale))
    for name in ("student", "plain"):
        adapter.forward(name, *inputs()).square().mean().backward()
    for name, parameter in module(bundle["student"]).named_parameters():
        assert (parameter.grad is not None) == is_adapter(name), name
    for layer, (a, b) in layers.items():
        full = module(bundle["plain"]).get_submodule(layer).weight.grad
        expected = {
            a: lora.scale * moving[b].detach().T @ full,
            b: lora.scale * full @ moving[a].detach().T,
        }
        for name, gradient in expected.items():
            own = moving[name].grad
            assert own.dtype == torch.float32
            floor = 1e-2 * max(float(g.norm()) for g in expected.values())
            assert (own - gradient).norm() <= tolerance * (gradient.norm() + floor), name


def test_default_targets_are_every_linear_layer_of_a_block_but_those_of_pictures():
    config = PUBLISHED["Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"].transformers["transformer"]
    architecture = inspect_model(WAN, config)
    layers = adapted_layers(architecture, LoraSpec(rank=1))
    assert set(layers) == {
        name
        for name in architecture.linear_layers
        if name.startswith("blocks.") and ".add_" not in name
    }
    assert len(layers) == 40 * 10


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("to_out", "did you mean 'to_out.0'"),
        ("q", "diffusers calls it 'to_q'"),
        ("ffn.0", "diffusers calls it 'ffn.net.0.proj'"),
        ("patch_embedding", r"Linear layers: .*attn2\.to_v"),
        ("_q", "did you mean 'to_q'"),
    ],
)
def test_targets_that_match_nothing(pipeline_template, config, target, message):
    lora = LoraSpec(rank=2, target_modules=("to_q", target))
    (problem,) = PLUGIN.role_problems(role(pipeline_template, lora), config)
    assert problem.path == ("lora", "target_modules")
    assert problem.message.startswith(f"{target!r} ")
    with pytest.raises(WeightsError, match=message):
        load(role(pipeline_template, lora), config)


def test_lora_problems_need_no_weights_and_no_folder(pipeline_template, config):
    published = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    lora = LoraSpec(rank=2, target_modules=("to_x",))
    wan = attrs.evolve(config, max_sequence_length=512)
    assert any("'to_x'" in p.message for p in PLUGIN.role_problems(role(published, lora), wan))
    nowhere = list(PLUGIN.role_problems(role(pipeline_template / "nowhere", lora), config))
    assert {p.path for p in nowhere} == {("path",)}
    assert not list(PLUGIN.role_problems(role(pipeline_template, LoraSpec(rank=2)), config))


def test_adapters_of_another_version_of_peft_are_refused(pipeline_template, config, monkeypatch):
    from distill_diffusers.roles import injection

    monkeypatch.setattr(injection, "ADAPTER", "other")
    with pytest.raises(WeightsError, match=r"peft .* gave \d+ adapter parameters"):
        load(role(pipeline_template), config)


# -- warm start -------------------------------------------------------------------------------


def checkpoint_of(handle: RoleHandle):
    return handle.weight_sources()["transformer"]


@settings(max_examples=6)
@given(lora=specs, precision=precisions)
def test_adapters_of_another_lora_role_are_loaded_beside_the_base(
    pipeline_template, config, lora, precision
):
    spec = role(pipeline_template, lora, precision=precision)
    first = load(spec, config)
    randomise(first)
    second = load(spec, config, seed=9, source=checkpoint_of(first))
    ours, theirs = module(first).state_dict(), module(second).state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
        assert value.data_ptr() != theirs[name].data_ptr(), name


def test_whole_weights_become_the_base(pipeline_template, config):
    trained = load(role(pipeline_template, None), config)
    with torch.no_grad():
        for parameter in module(trained).parameters():
            parameter.add_(1 / 3)
    spec = role(pipeline_template, precision="bf16")
    handle = load(spec, config, source=checkpoint_of(trained))
    start = load(spec, config)
    for name, value in module(handle).state_dict().items():
        if is_adapter(name):
            assert torch.equal(value, module(start).state_dict()[name])
        else:
            assert torch.equal(value, module(trained).state_dict()[base_name(name)].to(value.dtype))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            LoraSpec(rank=3),
            r"of another shape: .*lora_A\.default\.weight \[2, 24\].*lora of rank 3",
        ),
        (LoraSpec(rank=2, target_modules=("to_q",)), r"unexpected: .*to_k\.lora_A"),
        (
            LoraSpec(rank=2, target_modules=(*WAN.lora_targets, "proj_out")),
            r"2 missing: proj_out\.lora_A\.default\.weight",
        ),
        (None, r"rank 2, 20 layers.*no lora.*merged"),
    ],
)
def test_adapters_that_do_not_fit_are_named(pipeline_template, config, lora, message):
    source = checkpoint_of(load(role(pipeline_template), config))
    with pytest.raises(WeightsError, match=message) as raised:
        load(role(pipeline_template, lora), config, source=source)
    assert str(raised.value).startswith("role 'r', transformer")


def test_adapters_and_whole_weights_together_are_refused(pipeline_template, config):
    """A state dict of the whole injected module is neither full weights nor adapters."""
    handle = load(role(pipeline_template), config)
    source = TensorWeights("everything", module(handle).state_dict())
    with pytest.raises(WeightsError, match=r"everything: .*unexpected: .*base_layer"):
        load(role(pipeline_template), config, source=source)
