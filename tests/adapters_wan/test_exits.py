"""A Wan critic that is told the exit step: what it loads, trains, plans, saves and exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from distill_adapters_wan import PLUGIN
from distill_protocols import (
    EXIT_EMBEDDING,
    Condition,
    ExitSpec,
    ExportRequest,
    LoraSpec,
    ModelBundle,
    RoleSpec,
    SamplerSpec,
    WeightsError,
)
from wan_variants import VARIANTS

CPU = torch.device("cpu")
EXITS = ExitSpec(count=3)
EXPERTS = VARIANTS["t2v-experts"].config


@pytest.fixture(scope="module")
def folder(folder_of: Any) -> Path:
    return folder_of("t2v-experts")


def critic(folder: Path, **options: Any) -> RoleSpec:
    return RoleSpec(name="critic", path=str(folder), trainable=True, exits=EXITS, **options)


def load(*roles: RoleSpec, **options: Any) -> ModelBundle:
    return PLUGIN.load(roles, EXPERTS, device=CPU, **options)


def values(bundle: ModelBundle) -> dict[str, torch.Tensor]:
    sources = bundle["critic"].weight_sources()
    return {
        f"{key}.{name}": tensor
        for key, source in sources.items()
        for name, tensor in source.read(source.describe()).items()
    }


@pytest.mark.parametrize("lora", [None, LoraSpec(rank=2)])
def test_one_embedding_beside_both_experts_is_planned_trained_and_loaded_again(
    folder: Path, lora: LoraSpec | None
):
    """Of a LoRA critic too, whose base is another role's: the embedding is its own."""
    teacher = RoleSpec(name="teacher", path=str(folder), trainable=False)
    base = "teacher" if lora else None
    spec = critic(folder, lora=lora, base=base)
    bundle = load(teacher, spec)
    role = bundle["critic"]
    assert list(role.modules) == ["transformer", "transformer_2", EXIT_EMBEDDING]
    assert list(role.transformers) == ["transformer", "transformer_2"]
    (embedding,) = role.trained_parameters(EXIT_EMBEDDING).values()
    assert embedding.shape == (3, 24)
    assert not embedding.any()
    plan = {module.name: module for module in PLUGIN.plan(spec, EXPERTS).modules}
    (planned,) = plan[EXIT_EMBEDDING].tensors
    assert (planned.shape, planned.dtype, planned.trained) == ((3, 24), torch.float32, True)

    with torch.no_grad():
        for key in role.modules:
            for parameter in role.trained_parameters(key).values():
                parameter.add_(torch.randn(parameter.shape))
    again = load(teacher, spec, weights={"critic": role.weight_sources()})
    assert all(torch.equal(value, values(bundle)[name]) for name, value in values(again).items())
    old = {key: role.weight_sources()[key] for key in role.transformers}
    assert not any(load(teacher, spec, weights={"critic": old})["critic"]
                   .modules[EXIT_EMBEDDING].state_dict()["weight"].flatten())  # fmt: skip
    told_nothing = evolve(spec, exits=None)
    plain = load(teacher, told_nothing, weights={"critic": role.weight_sources()})
    assert list(plain["critic"].modules) == ["transformer", "transformer_2"]
    with pytest.raises(WeightsError, match="exit steps alone"):
        load(
            teacher, evolve(spec, exits=ExitSpec(count=4)),
            weights={"critic": role.weight_sources()},
        )  # fmt: skip


def test_an_export_is_that_of_a_critic_without(folder: Path, tmp_path: Path):
    spec = critic(folder)
    weights = load(spec)["critic"].weight_sources()
    request = ExportRequest(format="diffusers", sampler=SamplerSpec(steps=2))
    exporter = PLUGIN.exporter(EXPERTS, source=str(folder))
    exporter.export(spec, weights, tmp_path / "told", request)
    exporter.verify(spec, weights, tmp_path / "told", request)
    assert not list((tmp_path / "told").rglob(f"*{EXIT_EMBEDDING}*"))


def test_checkpointed_blocks_and_every_expert_give_the_embedding_its_gradient(folder: Path):
    """By frame, bit for bit the same with and without checkpointing; rows of no clip have none."""
    gradients = []
    for checkpointing in (False, True):
        bundle = load(critic(folder, activation_checkpointing=checkpointing))
        adapter = PLUGIN.adapter(bundle, EXPERTS, source=str(folder))
        generator = torch.Generator().manual_seed(0)
        x_t = torch.randn(2, *adapter.latent_shape, generator=generator)
        cond = Condition({"text": torch.randn(2, 6, 16, generator=generator)})
        exits = torch.zeros(1, x_t.shape[2], dtype=torch.int64)
        exits[:, -1] = 2
        module = bundle["critic"].modules[EXIT_EMBEDDING]
        for t in (950.0, 300.0):
            module.zero_grad()
            assert adapter.exits is not None
            v = adapter.exits.forward_at_exits(
                "critic", x_t, torch.full((2,), t), cond, exits=exits
            )
            v.square().mean().backward()
            (parameter,) = module.parameters()
            assert parameter.grad is not None
            assert parameter.grad.any(dim=1).tolist() == [True, False, True]
            gradients.append(parameter.grad.clone())
    assert all(map(torch.equal, gradients[:2], gradients[2:]))


def test_a_call_by_frame_is_planned_with_a_time_for_each_token(folder: Path):
    plans = [
        PLUGIN.plan_call(evolve(critic(folder), exits=exits), EXPERTS, source=str(folder), batch=1)
        for exits in (None, EXITS, evolve(EXITS, by_frame=True))
    ]
    assert None not in plans
    plain, told, by_frame = (plan.most for plan in plans if plan is not None)
    assert plain == told < by_frame
