"""DMD2's schedule, gradients, rollouts and refusals, on a small model behind the contract."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter

import attrs
import pytest
import torch
from distill_conformance.toy import (
    CAPABILITIES,
    LATENT_SHAPE,
    ToyAdapter,
    ToyConditioning,
    toy_batch,
)
from distill_methods import DMD2Config, DMD2Method, TeacherTerm, TimeSampling
from distill_methods.rollouts import Rollout
from distill_protocols import (
    CapabilityError,
    ConditioningError,
    DataError,
    RandomStreams,
    RoleError,
    SamplerSpec,
    StopRequested,
    keep_graph,
)
from toy_roles import gradients, toy_bundle

TWO_STEPS = SamplerSpec(steps=2, shift=3.0, stochastic=True)


def build(
    *, seed: int = 0, lr: float = 1e-2, bundle=None, has_negative=True, able=CAPABILITIES,
    streams=None, **options,
):  # fmt: skip
    bundle = bundle or toy_bundle(lr=lr, student=1, teacher=2, critic=3)
    config = DMD2Config(**{"student_sampler": TWO_STEPS} | options)
    return DMD2Method(
        bundle,
        ToyAdapter(bundle, capabilities=able),
        config,
        conditioning=ToyConditioning(has_negative),
        streams=streams or RandomStreams(seed),
    )


# -- gradients and losses ---------------------------------------------------------------------


@pytest.mark.parametrize("rollout", ["simulate", "data"])
def test_two_losses_in_one_backward_are_independent(rollout: str):
    """A joint turn gives each role just the gradient of its own loss."""
    options = {"rollout": rollout, "generator_update_interval": 1, "critic_update": "every_step"}
    joint = build(**options)
    joint.single_train_step(toy_batch(2), 1).loss_map["total_loss"].backward()
    grads = gradients(joint.bundle)
    for role, loss in (("student", "dmd_loss"), ("critic", "critic_loss")):
        alone = build(**options)
        alone.single_train_step(toy_batch(2), 1).loss_map[loss].backward()
        expected = gradients(alone.bundle)
        assert [name for name, values in expected.items() if values] == [role]
        for ours, theirs in zip(grads[role], expected[role], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


class Saved:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def step_of_two_turns(differentiate, **options):
    """Take a step of both roles; also say how much of the critic's graph the student's turn finds.

    Returns:
        Gradients, losses, and the tensors that are saved for a backward pass once the critic's turn
        has ended.
    """
    method = build(generator_update_interval=1, critic_update="every_step", **options)
    saved: weakref.WeakSet[Saved] = weakref.WeakSet()
    left: list[int] = []

    def end_turn(losses):
        losses = differentiate(losses)
        left.append(len(saved))
        return losses

    def keep(tensor):
        saved.add(one := Saved(tensor))
        return one

    method.end_turn = end_turn
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one.tensor):
        losses = method.single_train_step(toy_batch(2), 1).loss_map
    losses["total_loss"].backward()
    return gradients(method.bundle), losses, left


def test_the_critic_s_turn_ends_before_the_student_s_begins():
    """The same gradients and losses to the bit, and nothing of the critic's graph is left."""

    def differentiate(losses):
        losses["total_loss"].backward()
        return {name: loss.detach() for name, loss in losses.items()}

    together, losses, kept = step_of_two_turns(keep_graph)
    apart, ended, left = step_of_two_turns(differentiate)
    assert kept[0] > 0
    assert left == [0]
    assert ended.keys() == losses.keys()
    assert all(torch.equal(ended[name], losses[name]) for name in losses)
    for role, expected in together.items():
        assert all(map(torch.equal, apart[role], expected)), role


def test_a_critic_equal_to_the_teacher_gives_the_student_no_gradient():
    bundle = toy_bundle(student=1, teacher=2, critic=2)
    method = build(bundle=bundle, real_score_guidance_scale=1.0, generator_update_interval=2)
    result = method.single_train_step(toy_batch(3), 2)
    result.loss_map["total_loss"].backward()
    assert result.outputs["dmd_gradient_rms"] == 0
    assert gradients(bundle)["student"]
    assert all(g.abs().max() == 0 for g in gradients(bundle)["student"])


@pytest.mark.parametrize("critic_guidance", [1.0, 2.0])
def test_the_student_turn_against_an_independent_formula(critic_guidance: float):
    """Everything by hand from the recorded draws: rollout, noise, guidance, normaliser, loss."""
    method = build(
        generator_update_interval=2,
        real_score_guidance_scale=3.0,
        rollout="data",
        fake_score_guidance_scale=critic_guidance,
        critic_condition_dropout=0.1,
    )
    batch = toy_batch(2)
    result = method.single_train_step(batch, 2)
    result.loss_map["dmd_loss"].backward()
    actual = gradients(method.bundle)["student"]

    streams, nets = RandomStreams(0), {
        name: role.modules["transformer"] for name, role in method.bundle.roles.items()
    }  # fmt: skip
    text = batch.cond.tensors["text"]
    over = lambda value: value.view(-1, 1, 1, 1, 1)  # noqa: E731
    t_k = torch.tensor([1000.0, 750.0])[
        streams.rows("dmd2.student.data_step", 2).integers(2)
    ]  # S_3(1), S_3(.5)
    eps = streams.rows("dmd2.student.data_noise", 2).normal(LATENT_SHAPE)
    clean = (batch.latents - 0.5) / 2.0
    x_in = over(1 - t_k / 1000) * clean + over(t_k / 1000) * eps
    nets["student"].zero_grad()
    x = x_in - over(t_k / 1000) * nets["student"](x_in, t_k, text)
    u = streams.rows("dmd2.student.t", 2).uniform()
    t = (1000 * 5 * u / (1 + 4 * u)).clamp(20, 980)
    noise = streams.rows("dmd2.student.noise", 2).normal(LATENT_SHAPE)
    s = over(t / 1000)
    x_t = ((1 - s) * x + s * noise).detach()
    negative = torch.full_like(text, -0.5)
    c, n = (nets["teacher"](x_t, t, y) for y in (text, negative))
    real = x_t - s * (n + 3.0 * (c - n))
    c, n = (nets["critic"](x_t, t, y) for y in (text, negative))
    fake = x_t - s * (n + critic_guidance * (c - n))
    g = (fake - real) / (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    x.backward((g / g.numel()).detach())
    expected = [p.grad for p in nets["student"].parameters()]
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(result.loss_map["dmd_loss"], 0.5 * g.square().mean())


@pytest.mark.parametrize(
    ("exit_step", "error_of", "dropout"), [(0, "v", 0.0), (1, "x0", 0.0), (1, "eps", 0.9)]
)
def test_the_critic_turn_against_an_independent_formula(
    exit_step: int, error_of: str, dropout: float
):
    """Backward simulation by hand, then flow matching of the critic on the student's clip."""
    seed = next(
        seed
        for seed in itertools.count()
        if torch.randint(
            2, (), generator=RandomStreams(seed).get("dmd2.critic.exit_step", shared=True)
        )
        == exit_step
    )
    method = build(
        seed=seed,
        critic_time=TimeSampling(shift=2.0, t_min=50, t_max=900),
        critic_loss=error_of,
        critic_condition_dropout=dropout,
    )
    batch = toy_batch(2)
    result = method.single_train_step(batch, 1)
    assert result.outputs["exit_step"] == exit_step

    streams = RandomStreams(seed)
    student, critic = (method.bundle[n].modules["transformer"] for n in ("student", "critic"))
    text = batch.cond.tensors["text"]
    x = streams.rows("dmd2.critic.rollout", 2).normal(LATENT_SHAPE)
    x = x - student(x, torch.full((2,), 1000.0), text)
    if exit_step == 1:
        eps = streams.rows("dmd2.critic.rollout.fresh", 2).normal(LATENT_SHAPE)
        x = 0.25 * x + 0.75 * eps  # S_3(.5) = .75
        x = x - 0.75 * student(x, torch.full((2,), 750.0), text)
    u = streams.rows("dmd2.critic.t", 2).uniform()
    t = (1000 * 2 * u / (1 + u)).clamp(50, 900)
    noise = streams.rows("dmd2.critic.noise", 2).normal(LATENT_SHAPE)
    s = (t / 1000).view(-1, 1, 1, 1, 1)
    x_t = (1 - s) * x + s * noise
    dropped = streams.rows("dmd2.critic.dropout", 2).uniform() < dropout
    seen = torch.where(dropped[:, None], torch.full_like(text, -0.5), text)
    v = critic(x_t, t, seen)
    errors = {"v": v - (noise - x), "x0": x_t - s * v - x, "eps": x_t + (1 - s) * v - noise}
    expected = errors[error_of].square().mean()
    torch.testing.assert_close(result.loss_map["critic_loss"], expected, rtol=1e-5, atol=0)


class GaussianTeacher(torch.nn.Module):
    """The exact v of data whose every value is N(MEAN, STD^2)."""

    MEAN, STD = 1.0, 0.5

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        s = (t / 1000).view(-1, 1, 1, 1, 1)
        gain = self.STD**2 * (1 - s) / ((1 - s) ** 2 * self.STD**2 + s**2)
        return (x_t - self.MEAN - gain * (x_t - (1 - s) * self.MEAN)) / s


def test_the_student_matches_the_teachers_distribution():
    """Mean and spread of a Gaussian, from a student that starts at another place."""
    bundle = toy_bundle(lr=1e-2, student=1, teacher=2, critic=3)
    bundle["teacher"].modules["transformer"] = GaussianTeacher().requires_grad_(False)
    method = build(
        bundle=bundle,
        student_sampler=SamplerSpec(steps=1, stochastic=True),
        real_score_guidance_scale=1.0,
        score_shift=1.0,
        critic_update="every_step",
        generator_update_interval=3,
    )
    seen = []
    for iteration in range(1, 901):
        result = method.single_train_step(toy_batch(8, seed=iteration), iteration)
        result.loss_map["total_loss"].backward()
        method.optimizers_schedulers_step(iteration)
        method.optimizers_zero_grad(iteration)
        seen.append((result.outputs["student_mean"], result.outputs["student_std"]))
    start, end = torch.tensor(seen[0]), torch.tensor(seen[-90:]).mean(dim=0)
    assert ((start - torch.tensor([1.0, 0.5])).abs() > 0.5).all()
    assert end.tolist() == pytest.approx([1.0, 0.5], abs=0.15)


# -- calls ------------------------------------------------------------------------------------


def test_a_stopped_step_restores_modes_and_requires_grad():
    method = build(critic_update="every_step", generator_update_interval=1)
    method.stop.request("preempted")
    with pytest.raises(StopRequested):
        method.single_train_step(toy_batch(2), 1)
    assert method.adapter.calls == []
    for name, role in method.bundle.roles.items():
        module = role.modules["transformer"]
        assert module.training == (name != "teacher")
        assert all(p.requires_grad == (name != "teacher") for p in module.parameters())


def test_noised_data_goes_in_at_each_samples_own_level():
    method = build(
        rollout="data", student_sampler=SamplerSpec(steps=3, timesteps=(1000.0, 833.0, 500.0))
    )
    outputs = method.single_train_step(toy_batch(200), 5).outputs
    (call,) = [c for c in method.adapter.calls if c.role == "student"]
    counts = Counter(round(t) for t in call.t)
    assert sorted(counts) == [500, 833, 1000]
    assert all(45 <= n <= 90 for n in counts.values())  # 67 +- 3.4 sigma
    mean = (counts[833] + 2 * counts[500]) / 200
    assert outputs["exit_step"].item() == pytest.approx(mean)


@pytest.mark.parametrize("turn", [1, 5])
def test_exit_steps_are_uniform_and_calls_are_no_more_than_needed(turn: int):
    spec = SamplerSpec(steps=4, shift=5.0, stochastic=True)
    method = build(student_sampler=spec)
    counts: Counter[int] = Counter()
    for _ in range(400):
        method.adapter.calls.clear()
        exit_step = int(method.single_train_step(toy_batch(1), turn).outputs["exit_step"])
        calls = Counter(call.role for call in method.adapter.calls)
        assert calls["student"] == exit_step + 1
        assert calls["teacher"] == (1 if turn == 5 else 0)
        assert calls["critic"] == 1
        counts[exit_step] += 1
    assert sorted(counts) == [0, 1, 2, 3]
    assert all(70 <= n <= 130 for n in counts.values())  # 100 +- 3.5 sigma


def test_teacher_is_guided_and_critic_is_not_at_one_t_per_sample():
    method = build(real_score_guidance_scale=3.5, score_t_min=100.0, score_t_max=900.0)
    method.single_train_step(toy_batch(8), 5)
    calls = {call.role: call for call in method.adapter.calls}
    assert calls["teacher"].cfg == 3.5
    assert calls["critic"].cfg is None
    assert calls["teacher"].t == calls["critic"].t
    assert len(set(calls["teacher"].t)) > 4
    assert all(100 <= t <= 900 for t in calls["teacher"].t)
    assert not calls["teacher"].with_gradient
    assert not calls["critic"].with_gradient


def test_the_critic_may_learn_at_a_t_of_its_own():
    method = build(critic_time=TimeSampling(t_min=400, t_max=410))
    method.single_train_step(toy_batch(4), 1)
    (call,) = [c for c in method.adapter.calls if c.role == "critic"]
    assert all(400 <= t <= 410 for t in call.t)


def test_outputs_name_what_a_person_needs_to_judge_a_collapse():
    outputs = build().single_train_step(toy_batch(2), 5).outputs
    assert {n for n, v in outputs.items() if v.ndim == 5} == {
        "student_x0",
        "teacher_x0",
        "critic_x0",
    }
    assert {n for n, v in outputs.items() if v.ndim == 0} == {
        "student_mean", "student_std", f"student_std/exit_{int(outputs['exit_step'])}",
        "exit_step", "dmd_normaliser", "dmd_gradient_rms", "score_distance",
    }  # fmt: skip
    assert not any(value.requires_grad for value in outputs.values())


def test_the_deviation_of_each_exit_is_measured():
    """One exit a clip of a simulated rollout; of clips of the data set each its own."""
    method = build()
    for iteration in range(1, 9):
        outputs = method.single_train_step(toy_batch(3), iteration).outputs
        key = f"student_std/exit_{int(outputs['exit_step'])}"
        assert [n for n in outputs if n.startswith("student_std/")] == [key]
        expected = torch.stack([clip.std() for clip in outputs["student_x0"]]).mean()
        assert float(outputs[key]) == pytest.approx(float(expected))
        assert float(outputs["student_std"]) == pytest.approx(float(expected))
    x0 = torch.randn(3, 4, 5, 2, 2)
    exit_steps = torch.tensor([[0, 0, 2, 2, 2], [1, 1, 0, 0, 0], [2, 2, 2, 2, 2]])
    by_frame = Rollout(x0, exit_steps.float().mean(1), exit_steps).outputs()
    frames = {0: [x0[0, :, :2], x0[1, :, 2:]], 1: [x0[1, :, :2]], 2: [x0[0, :, 2:], x0[2]]}
    for k, parts in frames.items():
        expected = sum(float(part.std()) for part in parts) / len(parts)
        assert float(by_frame[f"student_std/exit_{k}"]) == pytest.approx(expected)
    by_clip = Rollout(x0, torch.tensor([0, 2, 2]), torch.tensor([[0], [2], [2]])).outputs()
    expected = float(x0[1].std() + x0[2].std()) / 2
    assert float(by_clip["student_std/exit_2"]) == pytest.approx(expected)


# -- refusals ---------------------------------------------------------------------------------


def test_a_guided_run_without_a_negative_condition_refuses_to_start():
    with pytest.raises(ConditioningError, match="no negative"):
        build(has_negative=False)
    build(has_negative=False, real_score_guidance_scale=1.0)


@pytest.mark.parametrize("missing", ["student", "teacher", "critic"])
def test_a_missing_role_is_named(missing: str):
    seeds = {name: 1 for name in ("student", "teacher", "critic") if name != missing}
    with pytest.raises(RoleError, match=rf"missing role\(s\): {missing}"):
        build(bundle=toy_bundle(**seeds))


def test_a_trainable_teacher_is_refused():
    bundle = toy_bundle(student=1, teacher=2, critic=3)
    bundle["teacher"].trainable = True
    with pytest.raises(RoleError, match=r"'teacher' is trainable.*Freeze the role"):
        build(bundle=bundle)


@pytest.mark.parametrize("role", ["student", "critic"])
def test_a_frozen_learner_is_refused(role: str):
    bundle = toy_bundle(student=1, teacher=2, critic=3)
    bundle[role].trainable = False
    with pytest.raises(RoleError, match=rf"'{role}' is frozen.*Make the role trainable"):
        build(bundle=bundle)


def test_a_missing_capability_is_named():
    with pytest.raises(CapabilityError, match="supports_cfg"):
        build(able=attrs.evolve(CAPABILITIES, supports_cfg=False))
    with pytest.raises(CapabilityError, match="pred:x0"):
        build(able=attrs.evolve(CAPABILITIES, supported_pred_types=frozenset({"v"})))


def test_a_failing_step_leaves_the_roles_as_they_were():
    method = build()
    broken = attrs.evolve(toy_batch(2), cond=toy_batch(3).cond)
    for turn, role in itertools.product((1, 5), ("student", "critic")):
        with pytest.raises(DataError, match="3 rows"):
            method.single_train_step(broken, turn)
        module = method.bundle[role].modules["transformer"]
        assert module.training
        assert all(p.requires_grad for p in module.parameters())


# -- decoupled guidance -------------------------------------------------------------------------


def test_decoupled_guidance_against_an_independent_formula():
    """The matching's part at the scores' t, the guidance's at another below the exit's, by hand."""
    seed = next(
        seed
        for seed in itertools.count()
        if torch.randint(
            2, (), generator=RandomStreams(seed).get("dmd2.student.exit_step", shared=True)
        )
    )  # the second step, t = 750
    method = build(
        seed=seed, decoupled=True, generator_update_interval=2, real_score_guidance_scale=3.0
    )
    batch = toy_batch(2)
    result = method.single_train_step(batch, 2)
    result.loss_map["total_loss"].backward()
    assert result.outputs["exit_step"] == 1
    streams, nets = RandomStreams(seed), {
        name: role.modules["transformer"] for name, role in method.bundle.roles.items()
    }  # fmt: skip
    text = batch.cond.tensors["text"]
    x = result.outputs["student_x0"]

    def noised(purpose: str, quantile: float) -> tuple[torch.Tensor, ...]:
        low = 0.02 / (5 - 4 * 0.02)  # the inverse of S_5 at .02
        u = streams.rows(f"{purpose}.t", 2).uniform()
        u = low + u * (quantile - low) if quantile < 1 else u
        t = (1000 * 5 * u / (1 + 4 * u)).clamp(20, 980)
        s = (t / 1000).view(-1, 1, 1, 1, 1)
        noise = streams.rows(f"{purpose}.noise", 2).normal(LATENT_SHAPE)
        return (1 - s) * x + s * noise, t, s

    x_t, t, s = noised("dmd2.student", 1.0)
    x_a, t_a, s_a = noised("dmd2.augmentation", 0.75 / (5 - 4 * 0.75))
    assert (t_a < 750).all()
    with torch.no_grad():
        fake = x_t - s * nets["critic"](x_t, t, text)
        real = x_t - s * nets["teacher"](x_t, t, text)
        c, u = (nets["teacher"](x_a, t_a, y) for y in (text, torch.full_like(text, -0.5)))
        augmented = real + (3.0 - 1) * (-s_a) * (c - u)  # x0 = x - s v
        g = (fake - real) - (augmented - real)
        g = g / (x - augmented).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(result.outputs["teacher_x0"], augmented, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.loss_map["dmd_loss"], 0.5 * g.square().mean())


def test_guidance_decoupled_at_the_same_noise_is_dmds(monkeypatch: pytest.MonkeyPatch):
    """Of several teachers with guidances of their own, by exit: the two parts add up to r."""
    options = {
        "generator_update_interval": 2, "real_score_guidance_scale": (2.0, 3.0),
        "teachers": {
            "teacher": TeacherTerm(weight=1.5),
            "other": TeacherTerm(weight=-0.5, guidance_scale=1.5),
        },
    }  # fmt: skip
    bundles = [toy_bundle(student=1, teacher=2, critic=3, other=4) for _ in range(2)]
    for bundle in bundles:
        bundle["other"].trainable = False
        bundle["other"].optimizers.clear()
        bundle["other"].schedulers.clear()
        bundle["other"].set_trainable(False)
    plain = build(bundle=bundles[0], **options)
    expected = plain.single_train_step(toy_batch(2), 2)
    method = build(bundle=bundles[1], decoupled=True, **options)
    draw, seen = method.noise.add_noise_at_random_time, []

    def same(*args: object, **kwargs: object) -> object:
        seen.append(seen[0] if seen else draw(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(type(method.noise), "add_noise_at_random_time", staticmethod(same))
    result = method.single_train_step(toy_batch(2), 2)
    assert len(seen) == 2
    torch.testing.assert_close(
        result.outputs["teacher_x0"], expected.outputs["teacher_x0"], rtol=1e-4, atol=1e-5
    )
