"""The methods through the real Wan adapter and a real (tiny) WanTransformer3DModel."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distill_adapters_wan.config import WanPipelineConfig
from distill_adapters_wan.plugin import PLUGIN as wan
from distill_methods import (
    DMD2Config,
    DMD2Method,
    FinetuneConfig,
    FinetuneMethod,
    TeacherOnlyConfig,
    TeacherOnlyMethod,
    TimeSampling,
)
from distill_protocols import (
    Batch,
    Condition,
    ContractError,
    ModelBundle,
    RandomStreams,
    RoleSpec,
    RowGenerators,
    SamplerSpec,
    SampleView,
    StopFlag,
    StopRequested,
)
from distill_runtime import DistillMethod
from torch import Tensor

FOLDER = str(Path(__file__).resolve().parents[2] / "configs/tiny/wan")
PIPELINE = WanPipelineConfig(num_frames=9, height=32, width=32, max_sequence_length=8)
SHAPE, TEXT = (8, 3, 4, 4), (8, 64)
TWO_STEPS = SamplerSpec(steps=2, shift=3.0, stochastic=True)
# One step: k is then the same in every micro batch, whatever the rollout.
ONE_STEP = SamplerSpec(steps=1, shift=3.0, stochastic=True)


class Conditioning:
    """A negative condition that is not zero."""

    def negative(self) -> Condition:
        return Condition({"text": torch.full((1, *TEXT), 0.3)})

    def encode(self, prompts, images=None):
        raise NotImplementedError


def load() -> ModelBundle:
    """Three roles of the shipped architecture with weights of their own, away from zero."""
    specs = [
        RoleSpec(name=name, path=FOLDER, trainable=name != "teacher")
        for name in ("student", "teacher", "critic")
    ]
    bundle = wan.load(specs, PIPELINE, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for key, module in bundle.by_module("modules").items():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise, alpha=0.02)
        role = bundle[key.split(".")[0]]
        if role.trainable:
            role.optimizers["transformer"] = torch.optim.AdamW(module.parameters(), lr=1e-4)
    return bundle


BUNDLE = pytest.fixture(scope="module", name="bundle")(load)


@pytest.fixture(name="batch", scope="module")
def _batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    return Batch(
        latents=torch.randn(4, *SHAPE, generator=generator),
        cond=Condition({"text": torch.randn(4, *TEXT, generator=generator)}),
        ids=("a", "b", "c", "d"),
    )


def make(name: str, bundle: ModelBundle, *, sampler: SamplerSpec = ONE_STEP) -> DistillMethod:
    adapter = wan.adapter(bundle, PIPELINE, source=FOLDER)
    parts = {"conditioning": Conditioning(), "streams": RandomStreams(0)}
    if name == "finetune":
        config = FinetuneConfig(time=TimeSampling(shift=3.0), weighting="bsmntw")
        return FinetuneMethod(bundle, adapter, config, **parts)
    if name == "teacher_only":
        return TeacherOnlyMethod(bundle, adapter, TeacherOnlyConfig(guidance_scale=2.0), **parts)
    cadence, rollout = name.split()
    config = DMD2Config(
        critic_update=cadence, rollout=rollout, generator_update_interval=2, student_sampler=sampler
    )
    return DMD2Method(bundle, adapter, config, **parts)


METHODS = [
    "finetune",
    "teacher_only",
    "alternate simulate",
    "alternate data",
    "every_step simulate",
]


def rows(batch: Batch, start: int, stop: int) -> Batch:
    part = slice(start, stop)
    return Batch(latents=batch.latents[part], cond=batch.cond[part], ids=batch.ids[part])


def take(method: DistillMethod, turn: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and gradients by role in one vector each."""
    for module in method.model_dict.values():
        module.zero_grad(set_to_none=True)
    loss = turn()
    grads = {
        key: torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        for key, module in method.model_dict.items()
        if any(p.grad is not None for p in module.parameters())
    }
    return loss, grads


def in_parts(method: DistillMethod, batch: Batch, iteration: int, size: int) -> Tensor:
    """Accumulate over micro batches of ``size``; the mean loss."""
    parts = [rows(batch, i, i + size) for i in range(0, len(batch), size)]
    losses = []
    for part in parts:
        loss = method.single_train_step(part, iteration).loss_map["total_loss"] / len(parts)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


@pytest.mark.parametrize("iteration", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_are_one_large_batch(name: str, iteration: int, bundle, batch: Batch):
    """One batch of 4 == two accumulated of 2 == four of 1, at equal draws of t and noise."""
    outcomes = []
    for size in (4, 2, 1):
        method = make(name, bundle)
        run = lambda method=method, size=size: in_parts(method, batch, iteration, size)  # noqa: E731
        outcomes.append(take(method, run))
    (loss, grads), *others = outcomes
    assert loss > 0
    for other_loss, other in others:
        torch.testing.assert_close(other_loss, loss, rtol=1e-4, atol=1e-6)
        assert other.keys() == grads.keys()
        for key, gradient in grads.items():
            error = (other[key] - gradient).norm() / gradient.norm()
            assert error < 1e-3, f"{key}: {error}"


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_every_weight_of_the_turn_and_no_other(name: str, bundle, batch: Batch):
    method = make(name, bundle, sampler=TWO_STEPS)
    for iteration in (1, 2):
        _, grads = take(method, lambda i=iteration: in_parts(method, batch, i, 4))
        turns = method.config.turns(iteration)
        assert set(grads) == {f"{role}.transformer" for role in turns}
        for key, gradient in grads.items():
            assert gradient.numel() == sum(p.numel() for p in method.model_dict[key].parameters())
            assert gradient.norm() > 0


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("exit_step", [0, 1, 2])
def test_a_rollout_by_hand_with_gradient_in_its_last_call_only(
    stochastic: bool, exit_step: int, bundle, batch: Batch
):
    """x0 = x - s v, then noised again or moved on along v; whole, it is the sampler bit for bit."""
    adapter = wan.adapter(bundle, PIPELINE, source=FOLDER)
    spec = SamplerSpec(steps=3, timesteps=(1000.0, 833.0, 500.0), stochastic=stochastic)
    cond, noise = batch.cond[:2], batch.latents[:2]

    def fresh() -> RowGenerators:
        return RowGenerators.seeded(7, "noise", range(2))

    seen: list[tuple[float, bool]] = []
    hook = (
        bundle["student"]
        .modules["transformer"]
        .register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(
                (float(kwargs["timestep"][0]), torch.is_grad_enabled())
            ),
            with_kwargs=True,
        )
    )
    rolled = adapter.rollout(
        "student", spec, noise, cond, exit_steps=[exit_step], generators=fresh()
    )
    hook.remove()
    assert rolled.requires_grad
    levels = [1000.0, 833.0, 500.0][: exit_step + 1]
    assert seen == [(pytest.approx(t), t == levels[-1]) for t in levels]

    x, draws = noise, fresh()
    with torch.no_grad():
        for t, after in itertools.pairwise([*levels, None]):
            v = adapter.forward("student", x, torch.full((2,), t), cond)
            x0 = x - t / 1000 * v
            if after is None:
                break
            s = after / 1000
            x = (1 - s) * x0 + s * draws.normal(SHAPE) if stochastic else x + (s - t / 1000) * v
    torch.testing.assert_close(rolled.detach(), x0, rtol=1e-5, atol=1e-5)
    if exit_step == 2:
        sampled = adapter.sample("student", spec, noise, cond, generators=fresh())
        assert torch.equal(rolled.detach(), sampled)
    no_exit = {"exit_steps": [exit_step], "generators": fresh(), "requires_grad": [False]}
    assert not adapter.rollout("student", spec, noise, cond, **no_exit).requires_grad


@pytest.mark.parametrize("number", [1, 3, 4])
def test_a_stop_ends_a_rollout_before_its_next_call(number: int, bundle, batch: Batch):
    adapter, stop, polls = wan.adapter(bundle, PIPELINE, source=FOLDER), StopFlag(), []
    spec = SamplerSpec(steps=4, shift=2.0)

    def poll() -> None:
        polls.append(1)
        if len(polls) == number:
            stop.request("preempted")
        stop.poll()

    with pytest.raises(StopRequested, match="preempted"), torch.no_grad():
        adapter.rollout(
            "student", spec, batch.latents[:1], batch.cond[:1], exit_steps=[3], poll=poll
        )
    assert len(polls) == number


def test_rollouts_that_cannot_be_are_refused(bundle, batch: Batch):
    adapter = wan.adapter(bundle, PIPELINE, source=FOLDER)
    arguments = ("student", TWO_STEPS, batch.latents, batch.cond)
    rows = RowGenerators.seeded(7, "noise", range(4))
    for options, message in [
        ({"exit_steps": [2], "generators": rows}, "they are 0 .. 1"),
        ({"exit_steps": [0, 1], "generators": rows}, "2 exit_steps .* 1 chunks"),
        ({"exit_steps": [1]}, "needs generators"),
    ]:
        with pytest.raises(ContractError, match=message):
            adapter.rollout(*arguments, **options)
    guided = SamplerSpec(steps=1, guidance=2.0)
    with pytest.raises(ContractError, match="one call of two"):
        adapter.rollout("student", guided, *arguments[2:], exit_steps=[0])


def test_views_decode_to_clips(bundle, batch: Batch):
    method = make("alternate simulate", bundle, sampler=TWO_STEPS)
    views = [
        SampleView(name="student", role="student"),
        SampleView(
            name="teacher", role="teacher", sampler=SamplerSpec(steps=3, shift=3.0, guidance=2.0)
        ),
    ]
    clips = method.sample_for_logging(views, batch.cond[:2], seed=1)
    assert {name: tuple(clip.shape) for name, clip in clips.items()} == {
        "student": (2, 3, 9, 32, 32),
        "teacher": (2, 3, 9, 32, 32),
    }
    assert all(clip.min() >= 0 and clip.max() <= 1 for clip in clips.values())
    again = method.sample_for_logging(views, batch.cond[:2], seed=1)
    assert torch.equal(clips["student"], again["student"])
