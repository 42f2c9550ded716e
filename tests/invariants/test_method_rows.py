"""A run's numbers do not depend on how its samples are cut into ranks and micro batches, for any
method and options. Ranks get the samples that ``LatentLoader`` gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import define, evolve, field, frozen
from distill_conditioning.order import rank_positions
from distill_conformance.toy import LATENT_SHAPE, ToyAdapter, ToyConditioning, toy_batch
from distill_methods import (
    CausalConsistencyConfig,
    CausalConsistencyMethod,
    CausVidConfig,
    CausVidMethod,
    ConsistencyConfig,
    ConsistencyMethod,
    Continuous,
    Discrete,
    DMD2Config,
    DMD2Method,
    FinetuneConfig,
    FinetuneMethod,
    GanConfig,
    KDConfig,
    KDMethod,
    LaddConfig,
    LaddMethod,
    RCMConfig,
    RCMMethod,
    SelfForcingConfig,
    SelfForcingMethod,
    TeacherOnlyConfig,
    TeacherOnlyMethod,
    TimeSampling,
)
from distill_protocols import Batch, Condition, RandomStreams, SamplerSpec
from distill_runtime import DistillMethod
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from toy_roles import BOTH_CAUSAL, CAUSAL, gradients, toy_bundle

ITERATIONS = (1, 2)  # the critic's turn and the student's


@define(eq=False)
class Watched(ToyAdapter):
    """Keeps what was drawn: noise and t of every noising, in the order of the calls; or which of
    the ``stored`` states a model was called with."""

    stored: bool = False
    drawn: list[tuple[Tensor, Tensor]] = field(factory=list)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        self.drawn.append((noise, t))
        return super().add_noise(x0, noise, t)

    def forward(self, role: str, x_t: Tensor, t: Tensor, cond: Condition, **options: Any) -> Tensor:
        if self.stored:
            self.drawn.append((x_t, t))
        return super().forward(role, x_t, t, cond, **options)


@frozen
class Cut:
    ranks: int
    micro_steps: int
    batch: int
    """Of one rank, one micro step."""


samplers = st.builds(
    SamplerSpec, steps=st.integers(1, 3), shift=st.floats(1.0, 8.0), stochastic=st.booleans()
)
times = st.builds(
    TimeSampling, distribution=st.sampled_from(["uniform", "logit_normal"]), t_min=st.just(50.0)
)
grids = st.builds(
    Discrete, steps=st.integers(4, 9), shift=st.floats(1.0, 8.0), skip=st.integers(1, 4)
)
tangents = st.builds(Continuous, time=times, tangent_warmup=st.integers(0, 3))
configs = (
    st.builds(
        DMD2Config,
        generator_update_interval=st.just(2),
        critic_update=st.sampled_from(["alternate", "every_step"]),
        rollout=st.sampled_from(["simulate", "data"]),
        student_sampler=samplers,
        critic_time=st.none() | times,
    )
    | st.builds(
        DMD2Config,
        generator_update_interval=st.just(2),
        critic_update=st.sampled_from(["alternate", "every_step"]),
        rollout=st.just("data"),
        student_sampler=samplers,
        gan=st.builds(
            GanConfig,
            train_features=st.booleans(),
            r1_weight=st.sampled_from([0.0, 1.0]),
        ),
        f_divergence=st.sampled_from(["reverse_kl", "js", "forward_kl"]),
    )
    | st.builds(
        LaddConfig,
        discriminator_update=st.sampled_from(["alternate", "every_step"]),
        rollout=st.sampled_from(["simulate", "data"]),
        time=times,
        r1_weight=st.sampled_from([0.0, 1.0]),
        student_sampler=samplers,
    )
    | st.builds(
        FinetuneConfig,
        time=times,
        times=st.sampled_from(["per_clip", "per_chunk"]),
        past=st.sampled_from(["noisy", "clean"]),
        student_sampler=samplers.map(lambda spec: evolve(spec, context_noise=60.0)),
    )
    | st.builds(
        SelfForcingConfig,
        generator_update_interval=st.just(2),
        same_step_across_chunks=st.booleans(),
        rollout_frames=st.sampled_from([None, (2, 4)]),
        student_sampler=samplers,
    )
    | st.builds(
        CausVidConfig,
        generator_update_interval=st.just(2),
        clean_chunks=st.booleans(),
        student_sampler=samplers,
    )
    | st.builds(KDConfig, student_sampler=samplers)
    | st.builds(
        TeacherOnlyConfig,
        time=times,
        student_sampler=samplers,
        input=st.sampled_from(["data", "student"]),
        target=st.sampled_from(["v", "x0"]),
    )
    | st.builds(ConsistencyConfig, student_sampler=samplers, discrete=grids)
    | st.builds(ConsistencyConfig, student_sampler=samplers, continuous=tangents)
    | st.builds(
        CausalConsistencyConfig,
        student_sampler=samplers.map(lambda spec: evolve(spec, context_noise=60.0)),
        discrete=grids,
        target=st.just("student"),
    )
    | st.builds(
        RCMConfig,
        generator_update_interval=st.just(2),
        rollout=st.sampled_from(["simulate", "data"]),
        student_sampler=samplers,
        continuous=tangents,
    )
)
METHODS: dict[type, Callable[..., DistillMethod]] = {
    CausalConsistencyConfig: CausalConsistencyMethod,
    CausVidConfig: CausVidMethod,
    DMD2Config: DMD2Method,
    FinetuneConfig: FinetuneMethod,
    LaddConfig: LaddMethod,
    SelfForcingConfig: SelfForcingMethod,
    ConsistencyConfig: ConsistencyMethod,
    RCMConfig: RCMMethod,
    TeacherOnlyConfig: TeacherOnlyMethod,
    KDConfig: KDMethod,
}


def rows(batch: Batch, places: range) -> Batch:
    index = torch.tensor(places)
    ids = tuple(batch.ids[place] for place in places)
    states = None if batch.trajectory is None else batch.trajectory[index]
    return Batch(latents=batch.latents[index], cond=batch.cond[index], ids=ids, trajectory=states)


def data_of(config: object, size: int, seed: int) -> Batch:
    batch = toy_batch(size, seed=seed)
    if not isinstance(config, KDConfig):
        return batch
    levels = config.student_sampler.steps
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(size, levels, *LATENT_SHAPE, generator=generator)
    return evolve(batch, trajectory=states)


def build(config: object, seed: int, rank: int, ranks: int) -> DistillMethod:
    names = [need.name for need in config.roles]
    on = "critic" if "critic" in names else "teacher"
    bundle = toy_bundle(heads_on=on, **{name: seed for seed, name in enumerate(names, start=1)})
    able = BOTH_CAUSAL if isinstance(config, CausalConsistencyConfig) else CAUSAL
    return METHODS[type(config)](
        bundle,
        Watched(bundle, capabilities=able, stored=isinstance(config, KDConfig)),
        config,
        conditioning=ToyConditioning(),
        streams=RandomStreams(seed, rank=rank, world_size=ranks),
    )


def train(
    config: object, seed: int, cut: Cut
) -> tuple[list[list[Tensor]], list[dict[str, Tensor]]]:
    """Of both iterations: what each sample drew, in the order of the data; loss and gradients, as
    means over micro steps and ranks."""
    methods = [build(config, seed, rank, cut.ranks) for rank in range(cut.ranks)]
    together, parts = cut.ranks * cut.batch, cut.ranks * cut.micro_steps
    draws, numbers = [], []
    for iteration in ITERATIONS:
        data = data_of(config, together * cut.micro_steps, seed=iteration)
        pairs_of: list[list[Tensor]] = [[] for _ in range(len(data))]
        losses = []
        for step in range(cut.micro_steps):
            for rank, method in enumerate(methods):
                places = rank_positions(step * together, cut.batch, rank, cut.ranks)
                method.adapter.drawn.clear()
                result = method.single_train_step(rows(data, places), iteration)
                loss = result.loss_map["total_loss"] / parts
                loss.backward()
                losses.append(loss.detach())
                for noise, t in method.adapter.drawn:
                    for place, *pair in zip(places, noise, t, strict=True):
                        pairs_of[place] += pair
        draws += pairs_of
        numbers.append({"loss": torch.stack(losses).sum()})
        for method in methods:
            for name, values in gradients(method.bundle).items():
                flat = [value.flatten() for value in values]
                numbers[-1][name] = numbers[-1].get(name, 0) + torch.cat([torch.zeros(1), *flat])
            method.optimizers_zero_grad(iteration)
    return draws, numbers


def assert_same_run(config: object, seed: int, cut: Cut, other: Cut) -> None:
    draws, numbers = train(config, seed, cut)
    other_draws, other_numbers = train(config, seed, other)
    assert len(draws) == len(other_draws)
    for mine, theirs in zip(draws, other_draws, strict=True):
        assert mine
        assert len(mine) == len(theirs)
        assert all(map(torch.equal, mine, theirs))
    for mine, theirs in zip(numbers, other_numbers, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            # fp32 sums in another order: they round by parts of their addends, not of what is left.
            rounding = 1e-6 * max(1.0, float(value.detach().abs().max()))
            torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=rounding)


def exits_early(config: object) -> bool:
    """Return whether each micro step draws an exit step or a length, which changes later calls."""
    if isinstance(config, SelfForcingConfig):
        return config.student_sampler.steps > 1 or config.rollout_frames is not None
    simulates = (
        isinstance(config, DMD2Config | LaddConfig | RCMConfig) and config.rollout == "simulate"
    )
    return simulates and config.student_sampler.steps > 1


@given(configs, st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_ranks_are_one_process_with_their_samples(config, seed, ranks, micro_steps, batch):
    full = Cut(ranks=1, micro_steps=micro_steps, batch=ranks * batch)
    assert_same_run(config, seed, full, Cut(ranks, micro_steps, batch))


@example(
    TeacherOnlyConfig(time=TimeSampling(t_min=50.0), student_sampler=SamplerSpec(steps=1)), 2414
)
@given(configs, st.integers(0, 2**31))
def test_four_samples_are_two_micro_batches_of_two_are_two_ranks_of_two(config, seed):
    full, halves, ranks = Cut(1, 1, 4), Cut(1, 2, 2), Cut(2, 1, 2)
    assert_same_run(config, seed, full, ranks)
    if exits_early(config):
        # Two micro batches have two exit steps: they are what two ranks of them are.
        assert_same_run(config, seed, halves, Cut(2, 2, 1))
    else:
        assert_same_run(config, seed, full, halves)
