"""Methods over {one expert, two} x {text, picture in channels, first frame}: who learns, and of
what. Invariants 3, 5 and 11, on real (tiny) transformers."""

from __future__ import annotations

import math

import pytest
import torch
from distill_adapters_wan import PLUGIN
from distill_methods import (
    DMD2Config,
    DMD2Method,
    FinetuneConfig,
    FinetuneMethod,
    TeacherOnlyConfig,
    TeacherOnlyMethod,
    TimeSampling,
)
from distill_methods.maths import sample_timesteps, timesteps_within
from distill_methods.plugins import dmd2, finetune
from distill_methods.time_ranges import below, share
from distill_protocols import (
    Batch,
    Condition,
    ContractError,
    RandomStreams,
    RoleSpec,
    RowGenerators,
    SamplerSpec,
    WeightAverage,
)
from distill_trainer import (
    DistillTrainer,
    EmaCallback,
    OptimizerConfig,
    TrainingConfig,
    build_optimizers,
)
from distill_trainer.plugins import EmaConfig
from hypothesis import given
from hypothesis import strategies as st
from wan_variants import VARIANTS

CPU = torch.device("cpu")
METHODS = ["finetune", "teacher_only", "alternate data", "every_step simulate"]
SHAPE = (4, 3, 4, 6)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Conditioning:
    """A negative condition of text alone: pictures stay."""

    def __init__(self, length):
        self.length = length

    def negative(self):
        return Condition({"text": torch.full((1, self.length, 16), 0.3)})

    def encode(self, prompts):
        raise NotImplementedError


@pytest.fixture(scope="module")
def world(folder_of):
    """(adapter, bundle) of one variant: student and critic train; loaded once a variant."""
    made = {}

    def make(name):
        if name not in made:
            config, path = VARIANTS[name].config, folder_of(name)
            roles = [
                RoleSpec(name=role, path=path, trainable=role != "teacher")
                for role in ("student", "teacher", "critic")
            ]
            bundle = PLUGIN.load(roles, config, device=CPU)
            for seed, module in enumerate(bundle.by_module("modules").values()):
                for parameter in module.parameters():
                    parameter.data.add_(normal(*parameter.shape, seed=seed), alpha=0.02)
            made[name] = PLUGIN.adapter(bundle, config, source=path), bundle
        return made[name]

    return make


def build(name, kind, world, *, seed=0, lr=1e-4):
    """The method with fresh optimizers and averages on the variant's own roles."""
    adapter, bundle = world(name)
    for role in bundle.roles.values():
        role.ema.clear()
        if role.trainable:
            build_optimizers(role, OptimizerConfig(lr=lr), horizon=50)
    parts = {
        "conditioning": Conditioning(VARIANTS[name].config.max_sequence_length),
        "streams": RandomStreams(seed),
    }
    # About half of it on either side of 875 and 900.
    time = TimeSampling(shift=8.0)
    if kind == "finetune":
        return FinetuneMethod(bundle, adapter, FinetuneConfig(time=time), **parts)
    if kind == "teacher_only":
        config = TeacherOnlyConfig(guidance_scale=2.0, time=time)
        return TeacherOnlyMethod(bundle, adapter, config, **parts)
    cadence, rollout = kind.split()
    config = DMD2Config(
        critic_update=cadence,
        rollout=rollout,
        generator_update_interval=2,
        score_shift=8.0,
        student_sampler=SamplerSpec(steps=4, shift=5.0, stochastic=True),
    )
    return DMD2Method(bundle, adapter, config, **parts)


def batch(name, world, size=4, seed=1):
    variant, (adapter, _) = VARIANTS[name], world(name)
    cond = Condition({"text": normal(size, variant.config.max_sequence_length, 16, seed=seed)})
    if variant.image:
        cond = adapter.with_image(cond, normal(size, 3, 32, 48, seed=seed + 1).sigmoid())
    return Batch(
        latents=normal(size, *SHAPE, seed=seed + 2), cond=cond, ids=tuple(map(str, range(size)))
    )


def part(whole, rows):
    return Batch(latents=whole.latents[rows], cond=whole.cond[rows], ids=whole.ids[rows])


def gradients(method):
    return {
        key: torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        for key, module in method.model_dict.items()
        if any(p.grad is not None for p in module.parameters())
    }


def turns(method, iteration):
    return {key.split(".")[0] for key in method.get_optimizers(iteration)}


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_the_roles_of_the_turn_and_one_expert_of_each(name, kind, world):
    method, given = build(name, kind, world), batch(name, world, size=2)
    reached = set()
    for iteration in range(1, 9):
        method.optimizers_zero_grad(iteration)
        method.single_train_step(given, iteration).loss_map["total_loss"].backward()
        found = gradients(method)
        assert sorted(key.split(".")[0] for key in found) == sorted(turns(method, iteration))
        assert all(bool(value.any()) for value in found.values())
        reached |= found.keys()
    method.optimizers_zero_grad(8)
    trained = {k for i in (1, 2) for k in method.get_optimizers(i)}
    assert reached == trained  # over eight iterations each expert has had its turns


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", VARIANTS)
def test_optimizer_schedule_and_average_move_together(name, kind, world, tmp_path):
    """Scheduler steps == optimizer steps == EMA updates, for any accumulation and expert."""
    method, given = build(name, kind, world), batch(name, world, size=1)
    training = TrainingConfig(
        output_dir=str(tmp_path), max_train_steps=10, global_batch_size=2,
        batch_size_per_device=1, trackers=(), progress=False,
    )  # fmt: skip
    roles = tuple({k.split(".")[0] for i in (1, 2) for k in method.get_optimizers(i)})
    averages = EmaCallback(EmaConfig(roles=roles, decay=0.5))
    before = {k: next(m.parameters()).clone() for k, m in method.model_dict.items()}
    result = DistillTrainer(training, callbacks=[averages], trackers=[]).run(method, [given])
    expected = dict.fromkeys(roles, 0)
    for iteration in range(1, 11):
        for role in turns(method, iteration):
            expected[role] += 1
    for role in roles:
        handle = method.bundle[role]
        counts = {key: result.updates[f"{role}.{key}"] for key in handle.modules}
        assert sum(counts.values()) == expected[role]
        if len(counts) == 2:
            assert all(counts.values()), counts
        for key, count in counts.items():
            assert handle.schedulers[key].last_epoch == count
            average: WeightAverage = handle.ema[key]
            assert average.updates == count
            steps = {int(s["step"]) for s in handle.optimizers[key].state.values()}
            assert steps == ({count} if count else set())
    for key, value in before.items():
        still = torch.equal(value, next(method.model_dict[key].parameters()))
        assert still == (result.updates.get(key, 0) == 0)


@pytest.mark.parametrize("kind", ["finetune", "teacher_only", "alternate data"])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("iteration", [2, 3])
def test_accumulation_is_one_large_batch(name, kind, iteration, world):
    """Of one expert, whatever the number of micro steps: never a part of the batch for each."""
    whole = batch(name, world)
    seen = []
    for size in (4, 2, 1):
        method = build(name, kind, world)
        for start in range(0, 4, size):
            micro = part(whole, slice(start, start + size))
            loss = method.single_train_step(micro, iteration).loss_map["total_loss"]
            (loss * size / 4).backward()
        seen.append(gradients(method))
        method.optimizers_zero_grad(iteration)
    for other in seen[1:]:
        assert other.keys() == seen[0].keys()
        for key, value in other.items():
            assert torch.allclose(value, seen[0][key], rtol=1e-3, atol=1e-6), key


# -- the first frame stays out --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["finetune", "teacher_only", "alternate data"])
def test_a_given_first_frame_stays_out_of_the_loss(kind, world):
    """TI2V: what the clip itself has there changes neither loss nor gradient."""
    found = []
    for value in (0.0, 50.0):
        method, given = build("ti2v", kind, world), batch("ti2v", world, size=2)
        given.latents[:, :, 0] = value
        loss = method.single_train_step(given, 2).loss_map["total_loss"]
        loss.backward()
        found.append((loss.detach(), gradients(method)))
        method.optimizers_zero_grad(2)
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(value, found[1][1][key]) for key, value in found[0][1].items())


def test_without_a_picture_the_first_frame_is_trained(world):
    losses = []
    for value in (0.0, 50.0):
        method, given = build("ti2v", "finetune", world), batch("ti2v", world, size=2)
        given.latents[:, :, 0] = value
        text = Batch(
            latents=given.latents, cond=Condition({"text": given.cond.tensors["text"]}),
            ids=given.ids,
        )  # fmt: skip
        losses.append(float(method.single_train_step(text, 2).loss_map["total_loss"].detach()))
    assert losses[1] > 2 * losses[0]


def test_the_velocity_loss_of_trained_frames_by_hand(world):
    method, given = build("ti2v", "finetune", world), batch("ti2v", world, size=2)
    got = float(method.single_train_step(given, 1).loss_map["total_loss"].detach())
    streams = RandomStreams(0)
    adapter, _ = world("ti2v")
    t = sample_timesteps(TimeSampling(shift=8.0), streams.rows("finetune.t", 2))
    noise = streams.rows("finetune.noise", 2).normal(SHAPE)
    x0 = adapter.normalize_latents(given.latents)
    x_t = adapter.add_noise(x0, noise, t)
    v = adapter.forward("student", x_t, t, given.cond)
    by_hand = (v - (noise - x0))[:, :, 1:].square().mean()
    assert got == pytest.approx(float(by_hand.detach()), rel=1e-5)


# -- how t is drawn -------------------------------------------------------------------------------

shifts = st.floats(0.2, 12)
distributions = st.builds(
    TimeSampling, shift=shifts, t_min=st.floats(0, 400), t_max=st.floats(600, 1000)
) | st.builds(
    TimeSampling, distribution=st.just("logit_normal"), mean=st.floats(-2, 2),
    std=st.floats(0.3, 2), shift=shifts,
)  # fmt: skip


@given(time=distributions, boundary=st.floats(50, 950, width=32))
def test_times_within_ranges_are_the_distribution_itself(time, boundary):
    """Drawn by range with the shares as chances, quantiles are those of drawing at once."""
    cut = [(0.0, boundary), (boundary, 1000.0)]
    shares = [share(time, *within) for within in cut]
    assert sum(shares) == pytest.approx(1)
    straight = sample_timesteps(time, RowGenerators([torch.Generator().manual_seed(0)] * 4000))
    high = (straight >= boundary).double().mean()
    assert float(high) == pytest.approx(shares[1], abs=5 * math.sqrt(0.25 / 4000))
    assert below(time, boundary) == pytest.approx(shares[0])
    # All quantiles of the distribution, range by range, are those of one whole range.
    whole = timesteps_within((torch.arange(50_000) + 0.5) / 50_000, time, (0.0, 1000.0))
    for within, part_of in zip(cut, shares, strict=True):
        if part_of < 0.02:
            continue
        t = timesteps_within(torch.linspace(0, 0.999999, 500), time, within)
        assert t.dtype == torch.float32
        assert bool((t >= within[0]).all())
        assert bool((t < within[1]).all()) or within[1] == 1000
        assert bool((t.diff() >= 0).all())
        inside = whole[(whole >= within[0]) & (whole < within[1] + (within[1] == 1000))]
        for q in (0.1, 0.5, 0.9):
            ours, theirs = t.quantile(q), inside.quantile(q)
            assert float(ours) == pytest.approx(float(theirs), abs=6 + 0.03 * 1000 / len(inside))


@given(time=distributions, boundary=st.floats(450, 550, width=32))
def test_times_never_reach_the_next_range(time, boundary):
    """Though fp32 would round the last of them onto its lower end."""
    last = torch.tensor([1 - 1e-15], dtype=torch.float64)
    assert float(timesteps_within(last, time, (0.0, boundary))) < boundary
    assert float(timesteps_within(0 * last, time, (boundary, 1000.0))) >= boundary


def test_which_expert_learns_is_drawn_by_its_share(world):
    """As often as plan and schedule expect: within four standard deviations in 3000 iterations."""
    count = 3000
    config = FinetuneConfig(time=TimeSampling(shift=8.0))
    method = build("t2v-experts", "finetune", world)
    share_of = lambda r: share(config.time, *r)  # noqa: E731
    drawn = [method.draws.range_of("x", i, share_of, "student") for i in range(1, count + 1)]
    expected = finetune.update_share(config, "student", 875.0, 1000.0)
    assert expected == pytest.approx(0.5333, abs=1e-3)  # 1 - u with 8 u / (1 + 7 u) = .875
    found = sum(low == 875.0 for low, _ in drawn) / count
    assert found == pytest.approx(expected, abs=4 * math.sqrt(0.25 / count))
    again = build("t2v-experts", "finetune", world)
    assert drawn[:9] == [again.draws.range_of("x", i, share_of, "student") for i in range(1, 10)]


def test_published_shares():
    """P(high) at .875 for shifts 5, 8 and 12, and a four-step student's single low step."""
    for shift, percent in ((5.0, 42), (8.0, 53), (12.0, 63)):
        assert round(100 * share(TimeSampling(shift=shift), 875, 1000)) == percent
    config = DMD2Config(student_sampler=SamplerSpec(steps=4, shift=12.0, stochastic=True))
    assert dmd2.update_share(config, "student", 0, 875) == 0.25
    assert dmd2.update_share(config, "student", 875, 1000) == 0.75
    # The critic learns at the scores' t, which end at 980.
    assert dmd2.update_share(config, "critic", 875, 1000) == pytest.approx(5 / 12, abs=1e-9)


# -- stepping -------------------------------------------------------------------------------------


def test_a_role_that_no_gradient_reaches_is_an_error(world):
    method = build("t2v-experts", "finetune", world)
    with pytest.raises(ContractError, match="no gradient reached student"):
        method.optimizers_schedulers_step(1)
    assert set(method.update_counts.values()) == {0}
