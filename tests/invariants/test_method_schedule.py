"""Invariants 5 and 11 of the methods: who is trained, and who steps."""

from __future__ import annotations

from distill_conformance.toy import ToyAdapter, ToyConditioning, toy_batch
from distill_methods import CausVidConfig, DMD2Config, SelfForcingConfig
from distill_methods.distribution_matching.config import MatchingConfig
from distill_methods.plugins import causvid, dmd2, self_forcing
from distill_protocols import RandomStreams, SamplerSpec
from distill_runtime import DistillMethod
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_roles import CAUSAL, gradients, toy_bundle

samplers = st.builds(
    SamplerSpec, steps=st.integers(1, 4), shift=st.floats(1.0, 8.0), stochastic=st.booleans()
)
cadences = st.sampled_from(["alternate", "every_step"])
rollouts = st.sampled_from(["simulate", "data"])
dmd2s = st.builds(
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


causals = st.builds(
    SelfForcingConfig,
    generator_update_interval=st.integers(2, 5),
    critic_update=cadences,
    same_step_across_chunks=st.booleans(),
    rollout_frames=st.sampled_from([None, (2, 5)]),
    student_sampler=samplers,
) | st.builds(
    # A clean chunk is the data, on all ranks here alike.
    CausVidConfig,
    generator_update_interval=st.integers(2, 5),
    clean_chunks=st.just(False),
    student_sampler=samplers,
)
configs = dmd2s | causals
PLUGINS = {DMD2Config: dmd2, SelfForcingConfig: self_forcing, CausVidConfig: causvid}


def build(config: MatchingConfig) -> DistillMethod:
    bundle = toy_bundle(student=1, teacher=2, critic=3)
    return PLUGINS[type(config)].build(
        config,
        bundle=bundle,
        adapter=ToyAdapter(bundle, capabilities=CAUSAL),
        conditioning=ToyConditioning(),
        streams=RandomStreams(0),
    )


@settings(max_examples=12)
@given(configs, st.integers(1, 3))
def test_the_planned_updates_are_those_that_step(config: MatchingConfig, accumulation: int):
    """Over 20 iterations: planned roles == roles with a gradient == optimizers == schedulers."""
    method = build(config)
    planned = dict.fromkeys(("student", "critic"), 0)
    for iteration in range(1, 21):
        turns = config.turns(iteration)
        for _ in range(accumulation):
            loss = method.single_train_step(toy_batch(1), iteration).loss_map["total_loss"]
            (loss / accumulation).backward()
        assert {name for name, grads in gradients(method.bundle).items() if grads} == set(turns)
        stepped = method.optimizers_schedulers_step(iteration)
        assert stepped == tuple(f"{role}.transformer" for role in turns)
        method.optimizers_zero_grad(iteration)
        for role in turns:
            planned[role] += 1
        assert method.update_counts == {f"{r}.transformer": n for r, n in planned.items()}
    for role, count in planned.items():
        assert method.bundle[role].schedulers["transformer"].last_epoch == count
