"""Hidden states of blocks, and discriminators on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from distill_adapters_wan import PLUGIN, WanPipelineConfig
from distill_adapters_wan.causal.config import CausalConfig
from distill_protocols import (
    CapabilityError,
    CompileSpec,
    Condition,
    ContractError,
    DiscriminatorSpec,
    RoleSpec,
    TensorWeights,
    WeightsError,
)
from torch import Tensor
from wan_variants import VARIANTS

CPU = torch.device("cpu")
WIDTH = 24
"""Of the random transformers of this folder."""
GRID = (2, 2, 3)
"""A clip of 5 frames of 32 x 48 pixels in patches."""


def specs(path: object, on: str = "teacher", **heads: Any) -> list[RoleSpec]:
    spec = DiscriminatorSpec(**{"on": on, "blocks": (1, 0), "width": 16} | heads)
    return [
        RoleSpec(name=on, path=str(path), trainable=on != "teacher"),
        RoleSpec(name="discriminator", path=str(path), trainable=True, heads=spec),
    ]


@pytest.fixture
def call() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "x_t": torch.randn(2, 4, 2, 4, 6, generator=generator),
        "t": torch.tensor([300.0, 800.0]),
        "cond": Condition({"text": torch.randn(2, 6, 16, generator=generator)}),
    }


def by_hand(transformer: Any, index: int, call: dict[str, Any]) -> Tensor:
    """Block outputs, put where each token's patch is, one by one."""
    seen: list[Tensor] = []
    hook = transformer.blocks[index].register_forward_hook(lambda *args: seen.append(args[2]))
    transformer(call["x_t"], call["t"], call["cond"].tensors["text"])
    hook.remove()
    features = torch.empty(2, WIDTH, *GRID)
    for token, (f, h, w) in enumerate(torch.cartesian_prod(*map(torch.arange, GRID)).tolist()):
        features[:, :, f, h, w] = seen[0][:, token]
    return features


def test_features_are_what_the_blocks_give(adapter, call):
    transformer = adapter._bundle["teacher"].modules["transformer"]
    features: dict[int, Tensor | None] = {1: None, 0: None}
    with torch.no_grad():
        pred = adapter.forward("teacher", **call, features=features)
        assert torch.equal(pred, adapter.forward("teacher", **call))
        for index, feature in features.items():
            assert feature.dtype == torch.float32
            assert torch.equal(feature, by_hand(transformer, index, call))
    assert list(features) == [1, 0]
    assert not any(block._forward_hooks for block in transformer.blocks)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointed_blocks_give_the_same_gradient(
    pipeline_template, config, call, trainable, precision
):
    """By the latents, and by the weights where they learn."""
    outcomes = []
    for checkpointing in (False, True):
        role = RoleSpec(
            name="a", path=str(pipeline_template), trainable=trainable, precision=precision,
            activation_checkpointing=checkpointing,
        )  # fmt: skip
        bundle = PLUGIN.load([role], config, device=CPU)
        adapter = PLUGIN.adapter(bundle, config, source=str(pipeline_template))
        x_t = call["x_t"].clone().requires_grad_()
        features: dict[int, Tensor | None] = {0: None, 1: None}
        adapter.forward("a", x_t, call["t"], call["cond"], features=features)
        sum(value.square().mean() for value in features.values()).backward()
        weights = bundle["a"].modules["transformer"].parameters()
        outcomes.append([x_t.grad, *(p.grad for p in weights if p.grad is not None)])
    plain, checkpointed = outcomes
    assert (len(plain) > 1) == trainable
    assert plain[0].abs().max() > 0
    assert all(map(torch.equal, plain, checkpointed))


def test_features_that_cannot_be_had_are_refused(adapter, call, pipeline_template, config):
    with pytest.raises(ContractError, match=r"block 2 must be within 0 \.\. 1"):
        adapter.forward("teacher", **call, features={2: None})
    with pytest.raises(ContractError, match=r"block -1 must be"):
        adapter.forward("teacher", **call, features={-1: None})
    with pytest.raises(CapabilityError, match="guidance w = 3"):
        adapter.forward("teacher", **call, neg_cond=call["cond"][:1], cfg=3.0, features={0: None})
    adapter.forward("teacher", **call, cfg=1.0, features={0: None})
    causal = evolve(config, causal=CausalConfig(roles=("a",), chunk_frames=1))
    bundle = PLUGIN.load(
        [RoleSpec(name="a", path=str(pipeline_template), trainable=False)], causal, device=CPU
    )
    with pytest.raises(CapabilityError, match="'a', which is causal"):
        PLUGIN.adapter(bundle, causal, source=str(pipeline_template)).forward(
            "a", **call, features={0: None}
        )


def test_heads_on_what_gives_no_features_are_refused(pipeline_template, config):
    teacher, heads = specs(pipeline_template)
    compiled = evolve(teacher, compile=CompileSpec(backend="eager"))
    with pytest.raises(WeightsError, match="blocks are compiled"):
        PLUGIN.load([compiled, heads], config, device=CPU)
    with pytest.raises(WeightsError, match="heads on 'teacher', which must be another role"):
        PLUGIN.load([heads], config, device=CPU)


@pytest.mark.parametrize("module", ["transformer", "transformer_2"])
def test_of_two_experts_the_called_one_gives_features(folder_of, module):
    path, variant = folder_of("t2v-experts"), VARIANTS["t2v-experts"]
    bundle = PLUGIN.load(specs(path), variant.config, device=CPU)
    adapter = PLUGIN.adapter(bundle, variant.config, source=path)
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(1, *adapter.latent_shape, generator=generator)
    t = torch.tensor([900.0 if module == "transformer" else 100.0])
    cond = Condition({"text": torch.randn(1, 6, 16, generator=generator)})
    features: dict[int, Tensor | None] = {0: None, 1: None}
    with torch.no_grad():
        adapter.forward("teacher", x_t, t, cond, features=features)
        seen: list[Tensor] = []
        transformer = bundle["teacher"].modules[module]
        hook = transformer.blocks[1].register_forward_hook(lambda *args: seen.append(args[2]))
        transformer(x_t, t, cond.tensors["text"])
        hook.remove()
    assert torch.equal(features[1].flatten(2).transpose(1, 2), seen[0])
    assert adapter.discriminate("discriminator", features).shape == (1, 2)
    assert PLUGIN.expert_ranges(specs(path)[1], variant.config) == {}


# -- heads ------------------------------------------------------------------------------------


def loaded(path: object, config: WanPipelineConfig, seed: int = 0, **heads: Any) -> Any:
    bundle = PLUGIN.load(specs(path, **heads), config, device=CPU, seed=seed)
    return PLUGIN.adapter(bundle, config, source=str(path)), bundle


def test_logits_are_one_a_head_and_of_their_own_clip(pipeline_template, config, call):
    adapter, bundle = loaded(pipeline_template, config)
    features: dict[int, Tensor | None] = {0: None, 1: None}
    with torch.no_grad():
        adapter.forward("teacher", **call, features=features)
        logits = adapter.discriminate("discriminator", features)
        assert logits.shape == (2, 2)
        assert logits.dtype == torch.float32
        for i in range(2):
            alone = {index: value[i : i + 1] for index, value in features.items()}
            torch.testing.assert_close(
                adapter.discriminate("discriminator", alone), logits[i : i + 1]
            )
        # In the order of the file, [1, 0], whatever that of the features.
        first = bundle["discriminator"].modules["heads"].blocks["1"](features[1])
        assert torch.equal(first, logits[:, 0])
    with pytest.raises(ContractError, match=r"features of blocks \[0\] for the heads"):
        adapter.discriminate("discriminator", {0: features[0]})
    with pytest.raises(ContractError, match="'teacher' is no discriminator"):
        adapter.discriminate("teacher", features)


def test_every_weight_of_the_heads_learns_and_the_features_too(pipeline_template, config, call):
    adapter, bundle = loaded(pipeline_template, config)
    x_t = call["x_t"].clone().requires_grad_()
    features: dict[int, Tensor | None] = {0: None, 1: None}
    adapter.forward("teacher", x_t, call["t"], call["cond"], features=features)
    adapter.discriminate("discriminator", features).square().sum().backward()
    assert x_t.grad.abs().max() > 0
    for name, parameter in bundle["discriminator"].modules["heads"].named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad.abs().max() > 0, name
    teacher = bundle["teacher"].modules["transformer"].parameters()
    assert all(p.grad is None for p in teacher)


def test_heads_are_drawn_from_seed_and_names_alone(pipeline_template, config):
    def heads(seed: int, draw: int = 0, **options: Any) -> dict[str, Tensor]:
        torch.manual_seed(draw)
        before = torch.get_rng_state()
        _, bundle = loaded(pipeline_template, config, seed=seed, **options)
        assert torch.equal(torch.get_rng_state(), before)
        return bundle["discriminator"].modules["heads"].state_dict()

    first, again, other = heads(1), heads(1, draw=5), heads(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.near.weight"], other["blocks.0.near.weight"])
    assert not torch.equal(first["blocks.0.near.weight"], first["blocks.1.near.weight"])
    alone = heads(1, blocks=(0,))
    assert all(torch.equal(value, first[name]) for name, value in alone.items())
    bound = (16 * 27) ** -0.5  # as nn.Conv3d draws
    weight = first["blocks.0.near.weight"]
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_a_plan_has_the_numbers_of_what_is_loaded(pipeline_template, config):
    _, bundle = loaded(pipeline_template, config)
    (module,) = PLUGIN.plan(specs(pipeline_template)[1], config).modules
    real = bundle["discriminator"].modules["heads"]
    assert [(t.name, t.shape) for t in module.tensors] == [
        (name, tuple(p.shape)) for name, p in real.named_parameters()
    ]
    assert module.parameters == sum(p.numel() for p in real.parameters())
    assert all(t.trained and t.dtype == torch.float32 for t in module.tensors)
    call = PLUGIN.plan_call(
        specs(pipeline_template)[1], config, source=str(pipeline_template), batch=2
    )
    assert 0 < call.held < call.most


def test_heads_start_with_weights_that_are_given_or_not_at_all(pipeline_template, config):
    given = loaded(pipeline_template, config, seed=9)[1]["discriminator"].weight_sources()
    roles = specs(pipeline_template)
    started = PLUGIN.load(roles, config, device=CPU, weights={"discriminator": given})
    state = started["discriminator"].modules["heads"].state_dict()
    expected = given["heads"].read(state)
    assert all(torch.equal(state[name], expected[name]) for name in state)
    wider = specs(pipeline_template, width=32)
    with pytest.raises(WeightsError, match="of another shape"):
        PLUGIN.load(wider, config, device=CPU, weights={"discriminator": given})
    with pytest.raises(WeightsError, match="with the one module 'heads'"):
        PLUGIN.load(
            roles, config, device=CPU,
            weights={"discriminator": {"transformer": TensorWeights("x", {})}},
        )  # fmt: skip
    with pytest.raises(WeightsError, match=r"heads.blocks: block 7 must be within 0 \.\. 1"):
        PLUGIN.load(specs(pipeline_template, blocks=(7,)), config, device=CPU)


def test_the_adapter_ignores_the_model_of_a_discriminator(folder_of):
    """Neither of its clip nor of its conditions: those are the others'."""
    path, variant = folder_of("ti2v"), VARIANTS["ti2v"]
    bundle = PLUGIN.load(specs(path, on="critic")[::-1], variant.config, device=CPU)
    adapter = PLUGIN.adapter(bundle, variant.config, source=path)
    assert adapter._image_kind == "frame"
    assert Path(path).is_dir()
