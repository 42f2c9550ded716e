"""Invariants 5, 9 and 11 of the methods: who learns, who steps, and who waits for whom."""

from __future__ import annotations

import torch
from distill_methods import DMD2Config, DMD2Method
from distill_methods.plugins import dmd2
from distill_protocols import RandomStreams, SamplerSpec
from hypothesis import given
from hypothesis import strategies as st
from toy_adapter import ToyAdapter, ToyConditioning, gradients, toy_batch, toy_bundle

samplers = st.builds(
    SamplerSpec, steps=st.integers(1, 4), shift=st.floats(1.0, 8.0), stochastic=st.booleans()
)
cadences = st.sampled_from(["alternate", "every_step"])
rollouts = st.sampled_from(["simulate", "data"])
configs = st.builds(
    DMD2Config,
    generator_update_interval=st.integers(2, 7),
    critic_update=cadences,
    rollout=rollouts,
    student_sampler=samplers,
    real_score_guidance_scale=st.floats(0.0, 6.0),
) | st.builds(
    DMD2Config,
    generator_update_interval=st.just(1),
    critic_update=st.just("every_step"),
    rollout=rollouts,
    student_sampler=samplers,
)


def build(config: DMD2Config, *, seed: int = 0, rank: int = 0) -> DMD2Method:
    bundle = toy_bundle(student=1, teacher=2, critic=3)
    return dmd2.build(
        config,
        bundle=bundle,
        adapter=ToyAdapter(bundle),
        conditioning=ToyConditioning(),
        streams=RandomStreams(seed, rank=rank, world_size=2),
    )


@given(configs, st.integers(1, 3))
def test_the_plan_is_what_really_steps(config: DMD2Config, accumulation: int):
    """Over 20 iterations: planned roles == roles with a gradient == optimizers == schedulers."""
    method = build(config)
    planned = dict.fromkeys(("student", "critic"), 0)
    for iteration in range(1, 21):
        turns = dmd2.updates(config, iteration)
        for _ in range(accumulation):
            loss = method.single_train_step(toy_batch(1), iteration).loss_map["total_loss"]
            (loss / accumulation).backward()
        assert {name for name, found in gradients(method.bundle).items() if found} == set(turns)
        stepped = method.optimizers_schedulers_step(iteration)
        assert stepped == tuple(f"{role}.transformer" for role in turns)
        method.optimizers_zero_grad(iteration)
        for role in turns:
            planned[role] += 1
        assert method.update_counts == {f"{r}.transformer": n for r, n in planned.items()}
    for role, count in planned.items():
        assert method.bundle[role].schedulers["transformer"].last_epoch == count


@given(configs)
def test_only_weights_of_the_turn_move(config: DMD2Config):
    method = build(config)
    for iteration in range(1, 9):
        before = {
            name: [p.detach().clone() for p in role.modules["transformer"].parameters()]
            for name, role in method.bundle.roles.items()
        }
        method.single_train_step(toy_batch(1), iteration).loss_map["total_loss"].backward()
        method.optimizers_schedulers_step(iteration)
        method.optimizers_zero_grad(iteration)
        moved = {
            name
            for name, old in before.items()
            for a, b in zip(
                old, method.bundle[name].modules["transformer"].parameters(), strict=True
            )
            if not torch.equal(a, b)
        }
        assert moved == set(config.turns(iteration))


@given(configs, st.integers(0, 2**31))
def test_ranks_make_the_same_calls_with_different_noise(config: DMD2Config, seed: int):
    """Or the ranks of a sharded student would wait for each other for ever."""
    ranks = [build(config, seed=seed, rank=rank) for rank in (0, 1)]
    for iteration in range(1, 9):
        seen = []
        for method in ranks:
            method.adapter.calls.clear()
            outputs = method.single_train_step(toy_batch(1), iteration).outputs
            calls = [(c.role, c.with_gradient, c.cfg) for c in method.adapter.calls]
            seen.append((calls, outputs["student_x0"]))
        assert seen[0][0] == seen[1][0]
        assert not torch.equal(seen[0][1], seen[1][1])
