"""KD: what it minimises, at which levels, and that minimising it works."""

from __future__ import annotations

import attrs
import pytest
import torch
from attrs import define
from distill_conformance.toy import (
    CAPABILITIES,
    LATENT_SHAPE,
    MEAN,
    STD,
    ToyAdapter,
    ToyConditioning,
    toy_batch,
)
from distill_methods import KDConfig, KDMethod
from distill_protocols import (
    Batch,
    CapabilityError,
    Chunk,
    CleanPast,
    ContractError,
    RandomStreams,
    RoleError,
    SamplerSpec,
)
from torch import Tensor
from toy_roles import toy_bundle

TIMES = (1000.0, 700.0, 400.0)
SAMPLER = SamplerSpec(steps=3, timesteps=TIMES, stochastic=True)


@define(eq=False)
class Causal(ToyAdapter):
    """Two chunks of one frame. A frame's prediction is x - s (own x + what is before it)."""

    seen: list[tuple[Tensor, Tensor]] = attrs.field(factory=list)

    @property
    def causal(self) -> Causal:
        return self

    def chunks(self, role: str, frames: int | None = None) -> tuple[Chunk, ...]:
        return (Chunk(0, 1), Chunk(1, 1))

    def forward(self, role, x_t, t, cond, *, caches=None, **_):
        assert t.shape == (len(x_t), 2)
        self.seen.append((x_t, t))
        past = caches.latents if isinstance(caches, CleanPast) else x_t
        before = torch.cat([torch.zeros_like(past[:, :, :1]), past[:, :, :1]], dim=2)
        scale = self.bundle[role].modules["transformer"].outer.weight.mean()
        return x_t - (t / 1000).view(len(t), 1, 2, 1, 1) * scale * (x_t + before)


def make(adapter=ToyAdapter, *, able=CAPABILITIES, bundle=None, **options) -> KDMethod:
    bundle = bundle or toy_bundle(student=1)
    return KDMethod(
        bundle,
        adapter(bundle, capabilities=able),
        KDConfig(**{"student_sampler": SAMPLER} | options),
        conditioning=ToyConditioning(has_negative=False),
        streams=RandomStreams(0),
    )


def trajectory_batch(size: int, seed: int = 0, levels: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed + 100)
    states = torch.randn(size, levels, *LATENT_SHAPE, generator=generator)
    return attrs.evolve(toy_batch(size, seed), trajectory=states)


def test_the_loss_against_an_independent_formula():
    method, batch = make(), trajectory_batch(8)
    actual = method.single_train_step(batch, 1)
    drawn = RandomStreams(0).rows("kd.level", 8).integers(3, (1,))[:, 0].tolist()
    assert set(drawn) == {0, 1, 2}  # or the formula would not be asked about all levels
    net = method.bundle["student"].modules["transformer"]
    errors = []
    for i, k in enumerate(drawn):
        x_t, t = batch.trajectory[i, k][None], torch.tensor([TIMES[k]])
        v = net(x_t, t, batch.cond.tensors["text"][i : i + 1])
        clean = (batch.latents[i] - MEAN) / STD
        errors.append((x_t - TIMES[k] / 1000 * v - clean).square().mean())
    expected = torch.stack(errors).mean()
    torch.testing.assert_close(actual.loss_map["total_loss"], expected, rtol=1e-5, atol=0)
    assert actual.outputs["teacher_x0"].equal((batch.latents - MEAN) / STD)
    assert method.adapter.calls[0].t == tuple(TIMES[k] for k in drawn)


def test_levels_are_uniform():
    method = make()
    batch = trajectory_batch(300)
    for iteration in range(1, 11):
        method.single_train_step(batch, iteration)
    called = [t for call in method.adapter.calls for t in call.t]
    for time in TIMES:
        assert abs(called.count(time) / len(called) - 1 / 3) < 0.03  # 3.5 standard deviations


@pytest.mark.parametrize(("past", "levels"), [("mixed", 4), ("noisy", 3), ("clean", 3)])
def test_chunks_of_a_causal_student_have_levels_of_their_own(past: str, levels: int):
    able = attrs.evolve(CAPABILITIES, supports_teacher_forcing=True, causal_roles={"student"})
    method, batch = make(Causal, able=able, past=past), trajectory_batch(400)
    loss = method.single_train_step(batch, 1).loss_map["total_loss"]
    [(x_t, t)] = method.adapter.seen
    known = torch.tensor([*TIMES, 0.0][:levels])
    k = (t[..., None] == known).nonzero()[:, -1].view(400, 2)
    joint = torch.stack([((k[:, 0] == a) & (k[:, 1] == b)).sum()
                         for a in range(levels) for b in range(levels)])  # fmt: skip
    assert (joint > 0).all()  # every pair occurs
    assert abs(torch.corrcoef(k.T.float())[0, 1]) < 0.2  # 4 standard deviations
    x0 = (batch.latents - MEAN) / STD
    among = torch.cat([batch.trajectory, x0[:, None]], dim=1)
    total = torch.zeros(())
    scale = method.bundle["student"].modules["transformer"].outer.weight.mean()
    for i in range(400):
        for frame in range(2):
            x = among[i, k[i, frame], :, frame]
            assert x_t[i, :, frame].equal(x)
            s = float(t[i, frame]) / 1000
            if s == 0:
                continue
            before = 0 if frame == 0 else (x0[i, :, 0] if past == "clean" else x_t[i, :, 0])
            total = total + (x - s * scale * (x + before) - x0[i, :, frame]).square().sum()
    if past == "mixed":
        total = total * 4 / 3  # one draw in four has no loss
    torch.testing.assert_close(loss, total / batch.latents.numel(), rtol=1e-4, atol=0)


def test_it_learns_where_the_trajectories_end():
    """Ways that end at one clip: a student that predicts it from everywhere."""
    method, batch = make(bundle=toy_bundle(student=1, lr=1e-2)), trajectory_batch(8)
    batch = attrs.evolve(batch, latents=torch.full_like(batch.latents, 1.5))
    losses = []
    for iteration in range(1, 201):
        loss = method.single_train_step(batch, iteration).loss_map["total_loss"]
        loss.backward()
        assert method.optimizers_schedulers_step(iteration) == ("student.transformer",)
        method.optimizers_zero_grad(iteration)
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.2 * sum(losses[:20])


def test_refusals():
    with pytest.raises(ContractError, match=r"holds none states.*3 levels.*trajectory_times"):
        make().single_train_step(toy_batch(2), 1)
    with pytest.raises(ContractError, match="holds 2 states"):
        make().single_train_step(trajectory_batch(2, levels=2), 1)
    with pytest.raises(CapabilityError, match=r"supports_teacher_forcing.*causal:student"):
        make(past="clean")
    with pytest.raises(RoleError, match=r"missing role.*student"):
        make(bundle=toy_bundle(teacher=1))


def test_options():
    with pytest.raises(ValueError, match=r"guidance 3 must be 1.*trajectories hold"):
        KDConfig(student_sampler=SamplerSpec(steps=2, guidance=3.0))
    with pytest.raises(ValueError, match=r"'mixed', 'noisy', 'clean'.*got 'dirty'"):
        KDConfig(past="dirty")
    config = KDConfig(student_sampler=SAMPLER)
    assert config.trajectory_times == pytest.approx(TIMES)
    assert [need.name for need in config.roles] == ["student"]
    assert not config.needs_negative
    assert config.update_share("student", 0, 500) == pytest.approx(1 / 3)
    assert config.update_share("student", 500, 1000) == pytest.approx(2 / 3)
