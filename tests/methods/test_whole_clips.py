"""The diversity anchor and the critic's interpolation, beside distribution matching."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from distill_adapters_wan import PLUGIN, WanPipelineConfig
from distill_conformance.toy import LATENT_SHAPE, ToyAdapter, ToyConditioning, toy_batch
from distill_methods import AnchorConfig, DMD2Config, DMD2Method
from distill_methods.distribution_matching.critic_interpolation import CriticInterpolation
from distill_protocols import (
    Chunk,
    ContractError,
    LoraSpec,
    PlannedRun,
    RandomStreams,
    RoleSpec,
    SamplerSpec,
)
from toy_roles import CAUSAL, gradients, toy_bundle

EXPERTS = Path(__file__).resolve().parents[2] / "configs/tiny/wan_experts"
PIPELINE = WanPipelineConfig(num_frames=9, height=32, width=32, max_sequence_length=8)
THREE = SamplerSpec(steps=3, shift=3.0, stochastic=True)
ANCHOR = AnchorConfig(weight=0.5, teacher_steps=5, anchor_step=3, shift=2.0)
ALIGNED: dict[str, Any] = {"critic_update": "every_step", "critic_interpolation": 0.25}


def build(*, seed: int = 0, bundle: Any = None, **options: Any) -> DMD2Method:
    bundle = bundle or toy_bundle(student=1, teacher=2, critic=3)
    config = DMD2Config(
        **{"student_sampler": THREE, "generator_update_interval": 2} | options  # type: ignore[arg-type]
    )
    return DMD2Method(
        bundle, ToyAdapter(bundle), config, conditioning=ToyConditioning(),
        streams=RandomStreams(seed),
    )  # fmt: skip


@pytest.mark.parametrize("guidance", [1.0, 3.0, (3.0, 1.0, 2.0)])
def test_the_anchor_against_an_independent_formula(guidance: float | tuple[float, ...]):
    """By hand: Euler's steps of the guided teacher from the drawn noise, loss and gradient."""
    batch, options = toy_batch(2), {"real_score_guidance_scale": guidance}
    method = build(anchor=ANCHOR, **options)
    result = method.single_train_step(batch, 2)
    result.loss_map["total_loss"].backward()
    whole = gradients(method.bundle)["student"]
    alone = build(anchor=ANCHOR, **options)
    alone.single_train_step(batch, 2).loss_map["dmd_loss"].backward()
    matched = gradients(alone.bundle)["student"]

    nets = {name: role.modules["transformer"] for name, role in method.bundle.roles.items()}
    text = batch.cond.tensors["text"]
    noise = RandomStreams(0).rows("dmd2.anchor.noise", 2).normal(LATENT_SHAPE)
    w = guidance[0] if isinstance(guidance, tuple) else guidance
    sigmas = [2 * u / (1 + u) for u in (1, 0.8, 0.6, 0.4)]  # S_2
    x = noise
    with torch.no_grad():
        for s, after in itertools.pairwise(sigmas):
            t = torch.full((2,), 1000 * s)
            c, n = (nets["teacher"](x, t, y) for y in (text, torch.full_like(text, -0.5)))
            x = x + (after - s) * (n + w * (c - n))
    nets["student"].zero_grad()
    velocity = nets["student"](noise, torch.full((2,), 1000.0), text)
    loss = (velocity - (noise - x) / (1 - sigmas[3])).square().mean()
    (0.5 * loss).backward()
    torch.testing.assert_close(result.loss_map["anchor_loss"], loss, rtol=1e-5, atol=0)
    for ours, other, p in zip(whole, matched, nets["student"].parameters(), strict=True):
        torch.testing.assert_close(ours, other + p.grad, rtol=1e-4, atol=1e-6)
    total = result.loss_map["dmd_loss"] + 0.5 * result.loss_map["anchor_loss"]
    torch.testing.assert_close(result.loss_map["total_loss"], total)


def test_with_an_anchor_the_first_step_is_no_exit():
    """Of the other steps the weights are as before, in both turns."""
    config = DMD2Config(student_sampler=THREE, anchor=ANCHOR, exit=(5.0, 1.0, 2.0))
    assert config.exit_weights == pytest.approx((0, 1, 2))
    exits = {
        (turn, build(seed=seed, anchor=ANCHOR).single_train_step(toy_batch(1), turn)
         .outputs["exit_step"].item())
        for seed in range(20) for turn in (1, 2)
    }  # fmt: skip
    assert exits == {(turn, step) for turn in (1, 2) for step in (1, 2)}


def step(method: DMD2Method, iteration: int) -> tuple[str, ...]:
    method.single_train_step(toy_batch(2, seed=iteration), iteration).loss_map[
        "total_loss"
    ].backward()
    stepped = method.optimizers_schedulers_step(iteration)
    method.optimizers_zero_grad(iteration)
    return stepped


def weights(method: DMD2Method) -> dict[str, list[torch.Tensor]]:
    return {
        name: [p.detach().clone() for p in role.modules["transformer"].parameters()]
        for name, role in method.bundle.roles.items()
    }


def test_the_critic_follows_each_update_of_the_student_and_nothing_else():
    aligned, plain = build(**ALIGNED), build(critic_update="every_step")
    step(aligned, 1)
    step(plain, 1)
    for name, values in weights(plain).items():  # the critic's own iteration
        assert all(map(torch.equal, values, weights(aligned)[name]))
    assert step(aligned, 2) == step(plain, 2) == ("student.transformer", "critic.transformer")
    before, after = weights(plain), weights(aligned)
    for name in ("student", "teacher"):
        assert all(map(torch.equal, before[name], after[name]))
    for s, c, ours in zip(before["student"], before["critic"], after["critic"], strict=True):
        torch.testing.assert_close(ours, 0.75 * c + 0.25 * s, rtol=1e-6, atol=1e-7)
        assert not torch.equal(ours, c)


def test_only_what_is_trained_of_both_is_interpolated():
    """As of LoRA roles: what is frozen is not read, and stays bit for bit."""
    bundle = toy_bundle(student=1, teacher=2, critic=3)
    for name in ("student", "critic"):
        names = [n for n, _ in bundle[name].modules["transformer"].named_parameters()]
        bundle[name].trained = {"transformer": frozenset(names[:2])}
        bundle[name].set_trainable(True)
        optimizer = bundle[name].optimizers["transformer"]
        del optimizer.param_groups[0]["params"][2:]
    method = build(bundle=bundle, **ALIGNED)
    before = weights(method)["critic"]
    step(method, 2)
    after = weights(method)["critic"]
    assert not any(map(torch.equal, before[:2], after[:2]))
    assert len(before) > 2
    assert all(map(torch.equal, before[2:], after[2:]))


def test_the_factors_of_a_lora_follow_in_the_expert_that_has_stepped():
    """On a Wan of two experts: the base and the other expert stay bit for bit, and by and by the
    critic's products B A are the student's."""
    lora, roles = LoraSpec(rank=2), []
    for name in ("student", "teacher", "critic"):
        adapted = lora if name != "teacher" else None
        roles.append(
            RoleSpec(name=name, path=str(EXPERTS), trainable=adapted is not None, lora=adapted)
        )
    bundle = PLUGIN.load(roles, PIPELINE, device=torch.device("cpu"))
    config = DMD2Config(real_score_guidance_scale=1.0, critic_update="every_step")
    adapter = PLUGIN.adapter(bundle, PIPELINE, source=str(EXPERTS))
    method = DMD2Method(bundle, adapter, config, conditioning=ToyConditioning(has_negative=False))
    student, critic = (bundle[name].modules["transformer_2"] for name in ("student", "critic"))
    generator = torch.Generator().manual_seed(0)
    for module in (student, critic):
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                parameter.data.normal_(generator=generator)
    before = {
        key: {name: p.detach().clone() for name, p in module.named_parameters()}
        for key, module in bundle["critic"].modules.items()
    }
    interpolation = CriticInterpolation(method.context, 0.25)
    interpolation.after_update(["student.transformer_2", "critic.transformer"])
    theirs = dict(student.named_parameters())
    for key, module in bundle["critic"].modules.items():
        for name, p in module.named_parameters():
            if key == "transformer" or ".lora_" not in name:
                assert torch.equal(p, before[key][name])
            else:
                expected = 0.75 * before[key][name] + 0.25 * theirs[name]
                torch.testing.assert_close(p.data, expected.data, rtol=1e-5, atol=1e-6)
    for _ in range(60):
        interpolation.after_update(["student.transformer_2"])
    for name, p in critic.named_parameters():
        torch.testing.assert_close(p, theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"anchor": ANCHOR}, ALIGNED])
def test_a_causal_student_is_refused(options: dict[str, Any]):
    bundle = toy_bundle(student=1, teacher=2, critic=3)
    adapter = ToyAdapter(bundle, capabilities=CAUSAL)
    config = DMD2Config(student_sampler=THREE, **options)
    with pytest.raises(ContractError, match="causal"):
        DMD2Method(bundle, adapter, config, conditioning=ToyConditioning())


def test_a_critic_of_other_weights_is_refused():
    bundle = toy_bundle(student=1, teacher=2, critic=3)
    bundle["critic"].trained = {"transformer": frozenset(("nothing",))}
    with pytest.raises(ContractError, match="critic's weights in 'transformer' are not"):
        CriticInterpolation(attrs.evolve(build().context, bundle=bundle), 0.03)


def test_problems_of_a_run_file():
    config = DMD2Config(student_sampler=THREE, anchor=ANCHOR, **ALIGNED)

    def problems(lora: LoraSpec | None = None, path: str = "a", frames: int = 3) -> list[str]:
        roles = {
            "student": RoleSpec(name="student", path="a", trainable=True, lora=lora),
            "critic": RoleSpec(name="critic", path=path, trainable=True, lora=LoraSpec(rank=2)),
        }
        run = PlannedRun(
            roles=roles,
            clip_frames=(3,),
            chunks=lambda _, n: tuple(Chunk(i, frames) for i in range(0, n, frames)),
        )
        return [".".join(problem.path) for problem in config.problems(run)]

    assert problems(LoraSpec(rank=2)) == []
    assert problems(None) == problems(LoraSpec(rank=2), "b") == ["critic_interpolation"]
    assert problems(LoraSpec(rank=2), frames=1) == ["anchor", "critic_interpolation"]
