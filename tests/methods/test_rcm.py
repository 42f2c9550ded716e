"""rCM: the sum of two losses that stand by themselves, and nothing else."""

from __future__ import annotations

import pytest
import torch
from distill_conformance.toy import ToyAdapter, ToyConditioning, toy_batch
from distill_methods import (
    ConsistencyConfig,
    Continuous,
    Discrete,
    DMD2Config,
    DMD2Method,
    RCMConfig,
    RCMMethod,
)
from distill_methods.consistency.losses import build_consistency_loss
from distill_methods.teachers.ensemble import Teachers
from distill_protocols import PlannedRun, RandomStreams, RoleError, RoleSpec, SamplerSpec
from toy_roles import gradients, toy_bundle

ONE_STEP = SamplerSpec(steps=1, shift=3.0, stochastic=True)
MATCHING = {
    "generator_update_interval": 2,
    "real_score_guidance_scale": 2.0,
    "student_sampler": ONE_STEP,
}
FORMS = {
    "continuous": {"continuous": Continuous(tangent_warmup=0)},
    "discrete": {"discrete": Discrete(steps=8, loss="l2")},
}
EVERY_FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def build(bundle=None, **options) -> RCMMethod:
    bundle = bundle or toy_bundle(student=1, teacher=2, critic=3)
    config = RCMConfig(**MATCHING | options)
    return RCMMethod(
        bundle,
        ToyAdapter(bundle),
        config,
        conditioning=ToyConditioning(),
        streams=RandomStreams(0),
    )


@EVERY_FORM
@pytest.mark.parametrize("weight", [0.07, 3.0])
def test_the_student_gets_both_gradients_with_their_weights(form, weight: float):
    """Against each loss by itself, on streams of the same names."""
    together, batch = build(consistency_weight=weight, **form), toy_batch(3)
    actual = together.single_train_step(batch, 2)
    actual.loss_map["total_loss"].backward()
    grads = gradients(together.bundle)
    assert {name for name, g in grads.items() if g} == {"student"}

    alone = build(consistency_weight=weight, **form)
    first = alone.single_train_step(batch, 2).loss_map["dmd_loss"]
    torch.testing.assert_close(first, actual.loss_map["dmd_loss"])
    first.backward()
    of_matching = gradients(alone.bundle)["student"]
    other = build(**form)
    loss = build_consistency_loss(
        other.context.named("rcm.consistency"),
        other.config.form,
        teachers=Teachers(other.context, ConsistencyConfig(guidance_scale=2.0)),
        update_of=lambda _: 1,
    )(batch, 2).loss
    torch.testing.assert_close(loss, actual.loss_map["consistency_loss"])
    loss.backward()
    of_consistency = gradients(other.bundle)["student"]
    for ours, a, b in zip(grads["student"], of_matching, of_consistency, strict=True):
        torch.testing.assert_close(ours, a + weight * b, rtol=1e-4, atol=1e-7)
        assert b.abs().max() > 0
    expected = actual.loss_map["dmd_loss"] + weight * loss
    torch.testing.assert_close(actual.loss_map["total_loss"], expected)


@EVERY_FORM
def test_rcm_without_consistency_weight_is_dmd2(form):
    """At weight 0 the student's gradient is that of matching, and the critic's turn is DMD2's."""
    rcm = build(consistency_weight=0.0, **form)
    bundle = toy_bundle(student=1, teacher=2, critic=3)
    dmd2 = DMD2Method(
        bundle,
        ToyAdapter(bundle),
        DMD2Config(**MATCHING),
        conditioning=ToyConditioning(),
        streams=RandomStreams(0),
    )
    for iteration in (1, 2):
        for method in (rcm, dmd2):
            method.single_train_step(toy_batch(2), iteration).loss_map["total_loss"].backward()
        ours = {name for name, g in gradients(rcm.bundle).items() if g}
        assert ours == {name for name, g in gradients(bundle).items() if g}
        assert ours == {"critic" if iteration == 1 else "student"}
        for method in (rcm, dmd2):
            method.optimizers_zero_grad(iteration)


def test_the_warmup_counts_the_students_updates():
    method = build(generator_update_interval=5, continuous=Continuous(tangent_warmup=4))
    turns = [i for i in range(1, 31) if "student" in method.config.turns(i)]
    shares = [method.config.form.warmup_at(method.config.student_updates(i)) for i in turns]
    assert shares == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@EVERY_FORM
def test_a_run_may_begin_with_consistency_alone(form):
    """Its turns are the student's, its gradient is that of the loss by itself, and the schedule of
    matching begins after it."""
    method, batch = build(consistency_warmup=3, consistency_weight=0.5, **form), toy_batch(3)
    config = method.config
    plain = build(**form).config
    assert [config.turns(i) for i in range(1, 4)] == [("student",)] * 3
    assert [config.turns(i) for i in range(4, 9)] == [plain.turns(i) for i in range(1, 6)]
    assert [config.student_updates(i) for i in range(1, 8)] == [1, 2, 3, 3, 4, 4, 5]
    result = method.single_train_step(batch, 3)
    result.loss_map["total_loss"].backward()
    assert {name for name, g in gradients(method.bundle).items() if g} == {"student"}
    other = build(**form)
    loss = build_consistency_loss(
        other.context.named("rcm.consistency"),
        other.config.form,
        teachers=Teachers(other.context, ConsistencyConfig(guidance_scale=2.0)),
        update_of=lambda _: 3,
    )(batch, 3).loss
    torch.testing.assert_close(result.loss_map["consistency_loss"], loss)
    (0.5 * loss).backward()
    pairs = zip(
        gradients(method.bundle)["student"], gradients(other.bundle)["student"], strict=True
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


def test_roles_and_capabilities_follow_the_options():
    config = RCMConfig()
    assert [need.name for need in config.roles] == ["student", "teacher", "critic"]
    assert isinstance(config.form, Continuous)
    assert "supports_jvp" in config.capabilities
    assert "supports_jvp" not in RCMConfig(discrete=Discrete()).capabilities
    with pytest.raises(ValueError, match="both stated"):
        RCMConfig(discrete=Discrete(), continuous=Continuous())
    with pytest.raises(ValueError, match="led away from consistency"):
        RCMConfig(consistency_weight=-1.0)
    with pytest.raises(RoleError, match=r"missing role\(s\): critic.*teacher_only"):
        build(bundle=toy_bundle(student=1, teacher=2))
    two = PlannedRun(
        roles={n: RoleSpec(name=n, path="./x", trainable=False) for n in ("student", "teacher")},
        experts=frozenset({"student", "teacher"}),
    )
    assert [".".join(p.path) for p in config.problems(two)] == ["continuous"]
    assert not list(RCMConfig(discrete=Discrete()).problems(two))


def test_an_expert_is_trained_by_either_loss():
    """Of times [1000, 700] half are high, of the grid's 8 points (shift 5) five."""
    spec = SamplerSpec(steps=2, timesteps=(1000.0, 700.0), stochastic=True)
    config = RCMConfig(discrete=Discrete(steps=8), student_sampler=spec)
    high = sum(t >= 800 for t in config.discrete.levels) / 8
    assert high == 0.625
    assert config.update_share("student", 800, 1000) == pytest.approx(1 - 0.5 * 0.375)
    plain = DMD2Config(student_sampler=spec)
    assert config.update_share("critic", 800, 1000) == plain.update_share("critic", 800, 1000)
