"""A run's numbers do not depend on how its samples are cut into ranks and micro batches, for any
method and options. Ranks get the samples that ``LatentLoader`` gives them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import define, field, frozen
from distill_conditioning.order import rank_positions
from distill_methods import (
    DMD2Config,
    DMD2Method,
    FinetuneConfig,
    FinetuneMethod,
    TeacherOnlyConfig,
    TeacherOnlyMethod,
    TimeSampling,
)
from distill_protocols import Batch, DistillMethod, RandomStreams, SamplerSpec
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toy_adapter import ToyAdapter, ToyConditioning, gradients, toy_batch, toy_bundle

ITERATIONS = (1, 2)  # the critic's turn and the student's


@define(eq=False)
class Watched(ToyAdapter):
    """Keeps what was drawn: noise and t of every noising, in the order of the calls."""

    drawn: list[tuple[Tensor, Tensor]] = field(factory=list)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        self.drawn.append((noise, t))
        return super().add_noise(x0, noise, t)


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
configs = (
    st.builds(
        DMD2Config,
        generator_update_interval=st.just(2),
        critic_update=st.sampled_from(["alternate", "every_step"]),
        rollout=st.sampled_from(["simulate", "data"]),
        student_sampler=samplers,
        critic_time=st.none() | times,
    )
    | st.builds(FinetuneConfig, time=times, student_sampler=samplers)
    | st.builds(TeacherOnlyConfig, time=times, student_sampler=samplers)
)
METHODS: dict[type, Callable[..., DistillMethod]] = {
    DMD2Config: DMD2Method,
    FinetuneConfig: FinetuneMethod,
    TeacherOnlyConfig: TeacherOnlyMethod,
}


def rows(batch: Batch, places: range) -> Batch:
    index = torch.tensor(places)
    ids = tuple(batch.ids[place] for place in places)
    return Batch(latents=batch.latents[index], cond=batch.cond[index], ids=ids)


def build(config: object, seed: int, rank: int, ranks: int) -> DistillMethod:
    bundle = toy_bundle(student=1, teacher=2, critic=3)
    return METHODS[type(config)](
        bundle,
        Watched(bundle),
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
        data = toy_batch(together * cut.micro_steps, seed=iteration)
        found: list[list[Tensor]] = [[] for _ in range(len(data))]
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
                        found[place] += pair
        draws += found
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
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def exits_early(config: object) -> bool:
    """Whether each micro step has an exit step of its own, which decides about calls."""
    simulates = isinstance(config, DMD2Config) and config.rollout == "simulate"
    return simulates and config.student_sampler.steps > 1


@given(configs, st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_ranks_are_one_process_with_their_samples(config, seed, ranks, micro_steps, batch):
    whole = Cut(ranks=1, micro_steps=micro_steps, batch=ranks * batch)
    assert_same_run(config, seed, whole, Cut(ranks, micro_steps, batch))


@given(configs, st.integers(0, 2**31))
def test_four_samples_are_two_micro_batches_of_two_are_two_ranks_of_two(config, seed):
    whole, halves, ranks = Cut(1, 1, 4), Cut(1, 2, 2), Cut(2, 1, 2)
    assert_same_run(config, seed, whole, ranks)
    if exits_early(config):
        # Two micro batches have two exit steps: they are what two ranks of them are.
        assert_same_run(config, seed, halves, Cut(2, 2, 1))
    else:
        assert_same_run(config, seed, whole, halves)
