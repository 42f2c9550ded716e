"""Consistency distillation: both losses against independent formulas, and what may learn."""

from __future__ import annotations

import math
from typing import Any

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
from distill_methods import (
    ConsistencyConfig,
    ConsistencyMethod,
    Continuous,
    Discrete,
    RCMConfig,
    TeacherTerm,
    TimeSampling,
)
from distill_methods.consistency.config import form_problems
from distill_methods.derivatives import finite_difference
from distill_methods.maths import normalised_tangent, x0_distance
from distill_protocols import (
    CapabilityError,
    ContractError,
    PlannedRun,
    RandomStreams,
    RoleSpec,
    SamplerSpec,
)
from hypothesis import given
from hypothesis import strategies as st
from slow_cases import slow_but
from toy_roles import gradients, toy_bundle

NUMEL = math.prod(LATENT_SHAPE)
NOW = Continuous(tangent_warmup=0)


def build(
    *, adapter=ToyAdapter, able=CAPABILITIES, seed=0, bundle=None, **options
) -> ConsistencyMethod:
    bundle = bundle or toy_bundle(student=1, teacher=2)
    return ConsistencyMethod(
        bundle,
        adapter(bundle, capabilities=able),
        ConsistencyConfig(**options),
        conditioning=ToyConditioning(),
        streams=RandomStreams(seed),
    )


def discrete(**options) -> ConsistencyMethod:
    return build(discrete=Discrete(**options))


def continuous(**options) -> ConsistencyMethod:
    return build(continuous=Continuous(**{"tangent_warmup": 0} | options))


def over(value: torch.Tensor) -> torch.Tensor:
    return value.view(-1, 1, 1, 1, 1)


def nets(method):
    return (method.bundle[n].modules["transformer"] for n in ("student", "teacher"))


# -- discrete ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["l2", "huber"])
@pytest.mark.parametrize("skip", [1, 3])
def test_a_pair_against_an_independent_formula(loss: str, skip: int):
    """t, the teacher's step and both clean clips by hand, in fp64 but for the nets."""
    method = build(discrete=Discrete(steps=4, shift=3.0, skip=skip, loss=loss), guidance_scale=2.0)
    batch = toy_batch(6)
    actual = method.single_train_step(batch, 1)
    actual.loss_map["total_loss"].backward()
    grads = gradients(method.bundle)

    streams, text = RandomStreams(0), batch.cond.tensors["text"]
    student, teacher = nets(method)
    student.zero_grad()
    grid = torch.tensor([3 * u / (1 + 2 * u) for u in (1.0, 0.75, 0.5, 0.25)] + [0.0] * skip)
    n = streams.rows("consistency.pair", 6).integers(4)
    s, after = grid[n], grid[n + skip]
    eps = streams.rows("consistency.noise", 6).normal(LATENT_SHAPE)
    x_t = over(1 - s) * (batch.latents - 0.5) / 2.0 + over(s) * eps
    c, u = (teacher(x_t, 1000 * s, y) for y in (text, torch.full_like(text, -0.5)))
    x_after = (x_t + over(after - s) * (2 * c - u)).detach()
    target = (x_after - over(after) * student(x_after, 1000 * after, text)).detach()
    d = x_t - over(s) * student(x_t, 1000 * s, text) - target
    expected = d.square() if loss == "l2" else (d.square() + 1e-6).sqrt() - 1e-3
    torch.testing.assert_close(actual.loss_map["total_loss"], expected.mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(actual.outputs["target_x0"], target, rtol=1e-5, atol=1e-6)
    expected.mean().backward()
    assert not grads["teacher"]
    for ours, theirs in zip(grads["student"], gradients(method.bundle)["student"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)


def test_at_the_end_of_the_grid_the_target_is_the_teachers_own_point():
    """f(x, 0) = x whatever the student predicts there, also for enormous values."""
    method = discrete(steps=2, skip=2)
    student, _ = nets(method)
    batch = toy_batch(4)
    first = method.single_train_step(batch, 1).outputs["target_x0"]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1e6)
    method.streams.load_state_dict(RandomStreams(0).state_dict())
    assert torch.equal(method.single_train_step(batch, 1).outputs["target_x0"], first)


def test_huber_of_small_differences_keeps_its_digits():
    """sqrt(d^2 + c^2) - c in fp32 has none left at d = 1e-6 c; d^2 / 2c is right to 1e-12."""
    d = torch.full((1, 1), 1e-6)
    value = x0_distance(d, torch.zeros_like(d), huber_c=1.0)
    assert float(value) == pytest.approx(0.5e-12, rel=1e-5)


class Straight(torch.nn.Module):
    """v of a teacher that knows one clip, MEAN: its trajectories are straight lines to it."""

    MEAN = 1.5

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return (x_t - self.MEAN) / over(t / 1000).clamp(min=1e-3)


FORMS: dict[str, dict[str, Any]] = {
    "discrete": {"discrete": Discrete(steps=8, shift=3.0, loss="l2")},
    "skipping": {"discrete": Discrete(steps=8, shift=3.0, skip=4, huber_c=0.1)},
    "continuous": {
        "continuous": Continuous(tangent_warmup=50, time=TimeSampling(t_min=50, t_max=950))
    },
}


@pytest.mark.parametrize("form", slow_but(("skipping",), FORMS))
def test_one_call_comes_to_give_what_the_trajectory_ends_at(form):
    options = FORMS[form]
    bundle = toy_bundle(lr=1e-2, student=1, teacher=2)
    bundle["teacher"].modules["transformer"] = Straight().requires_grad_(False)
    method = build(bundle=bundle, guidance_scale=1.0, **options)
    batch = toy_batch(16)

    def error() -> float:
        noise = torch.randn(64, *LATENT_SHAPE, generator=torch.Generator().manual_seed(1))
        text = batch.cond.tensors["text"].repeat(4, 1)
        with torch.no_grad():
            t = torch.full((64,), 900.0)
            x0 = noise - 0.9 * bundle["student"].modules["transformer"](noise, t, text)
        return float((x0 - Straight.MEAN).abs().mean())

    before = error()
    for iteration in range(1, 601):
        method.single_train_step(toy_batch(16, seed=iteration), iteration).loss_map[
            "total_loss"
        ].backward()
        method.optimizers_schedulers_step(iteration)
        method.optimizers_zero_grad(iteration)
    # A normalised tangent is as long near the end as far from it: it comes as near as lr lets it.
    assert error() < (0.6 if method.config.continuous else 0.25) * before


# -- two experts ------------------------------------------------------------------------------


class Routed(ToyAdapter):
    """Roles of two experts, one network here, which raise if a call is on both sides."""

    @property
    def experts(self):
        return self

    def expert_ranges(self, *roles: str):
        return ((0.0, 700.0), (700.0, 1000.0))

    def forward(self, role, x_t, t, cond, **options):
        sides = {float(value) >= 700 for value in t}
        assert len(sides) == 1, (role, t)
        return super().forward(role, x_t, t, cond, **options)


TWO = attrs.evolve(CAPABILITIES, supports_expert_routing=True)


def test_pairs_of_two_experts_stay_on_one_side_and_cross_together():
    """Every call has one expert, each t has its share, and micro batches of an iteration agree."""
    grid = Discrete(steps=10, shift=3.0, skip=2)
    method = build(discrete=grid, adapter=Routed, able=TWO)
    seen: dict[float, int] = dict.fromkeys(grid.levels, 0)
    crossing = 0
    for iteration in range(1, 401):
        method.adapter.calls.clear()
        for _ in range(2):
            method.single_train_step(toy_batch(4), iteration)
        sides = {(c.role, c.with_gradient, c.t[0] >= 700) for c in method.adapter.calls}
        assert len(sides) == 3
        learned = [c for c in method.adapter.calls if c.with_gradient]
        for t in (t for call in learned for t in call.t):
            seen[min(seen, key=lambda level: abs(level - t))] += 1
        crossing += len({side for _, _, side in sides}) == 2
    assert all(180 <= n <= 460 for n in seen.values()), seen  # 320 of 3200; clustered by 8
    across = sum(t >= 700 > after for t, after in grid.pairs)
    assert across == 2
    assert 50 <= crossing <= 112  # 80 +- 4 sigma
    config = method.config
    assert config.update_share("student", 700, 1000) == sum(t >= 700 for t in grid.levels) / 10


def test_continuous_is_not_for_two_experts():
    with pytest.raises(ContractError, match=r"'student' has two experts.*Use discrete"):
        build(continuous=NOW, adapter=Routed, able=TWO)
    run = PlannedRun(
        roles={n: RoleSpec(name=n, path="./x", trainable=False) for n in ("student", "teacher")},
        experts=frozenset({"student"}),
    )
    assert [".".join(p.path) for p in ConsistencyConfig(continuous=NOW).problems(run)] == [
        "continuous"
    ]
    assert not list(ConsistencyConfig().problems(run))
    alone = attrs.evolve(run, experts=frozenset({"teacher"}))
    assert not list(ConsistencyConfig(continuous=NOW).problems(alone))


# -- continuous -------------------------------------------------------------------------------


def trigflow_tangent(student, x_t, s, text, velocity):
    """cos(t) df/dt of f = cos(t) z - sin(t) F(z, t) in TrigFlow's z and t: sCM's g, by autograd in
    fp64 on F itself and not by the derivation that ``maths.consistency_tangent`` cites."""
    angle = torch.atan2(s, 1 - s)
    z = x_t * over(torch.cos(angle) + torch.sin(angle))

    def F(z, angle):
        sum_ = over(torch.cos(angle) + torch.sin(angle))
        x = z / sum_
        s = torch.sin(angle) / sum_.flatten()
        x0 = x - over(s) * student(x, 1000 * s, text)
        return (over(torch.cos(angle)) * z - x0) / over(torch.sin(angle))

    def f(z, angle):
        return over(torch.cos(angle)) * z - over(torch.sin(angle)) * F(z, angle)

    x0 = x_t - over(s) * velocity
    dz = (over(torch.cos(angle)) * z - x0) / over(torch.sin(angle))  # the teacher's F
    _, df = torch.func.jvp(f, (z, angle), (dz, torch.ones_like(angle)))
    return F(z, angle), over(torch.cos(angle)) * df


@pytest.mark.parametrize("prior_weight", ["none", "inverse_noise"])
def test_the_tangent_is_scms_in_trigflow(prior_weight: str):
    """The whole loss and its gradient, from F and df/dt of TrigFlow. Tolerance: fp32's nets."""
    bundle = toy_bundle(student=1, teacher=2)
    time = TimeSampling(distribution="logit_normal", mean=0.7, std=1.6)
    method = build(
        bundle=bundle, guidance_scale=2.0,
        continuous=Continuous(tangent_warmup=0, time=time, prior_weight=prior_weight),
    )  # fmt: skip
    batch = toy_batch(5)
    actual = method.single_train_step(batch, 1)
    actual.loss_map["total_loss"].backward()
    grads = [g.double() for g in gradients(bundle)["student"]]

    streams = RandomStreams(0)
    student, teacher = (net.double() for net in nets(method))
    student.zero_grad()
    text = batch.cond.tensors["text"].double()
    t = 1000 * torch.sigmoid(0.7 + 1.6 * streams.rows("consistency.t", 5).normal())
    s = t.double() / 1000
    eps = streams.rows("consistency.noise", 5).normal(LATENT_SHAPE).double()
    x_t = over(1 - s) * (batch.latents.double() - 0.5) / 2.0 + over(s) * eps
    c, u = (teacher(x_t, t.double(), y) for y in (text, torch.full_like(text, -0.5)))
    F, g = trigflow_tangent(student, x_t, s, text, 2 * c - u)
    torch.testing.assert_close(
        actual.outputs["tangent_rms"].double(), g.square().mean().sqrt(), rtol=1e-4, atol=0
    )
    g = math.sqrt(NUMEL) * g / (g.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1) + 0.1)
    weight = 1 / torch.tan(torch.atan2(s, 1 - s)) if prior_weight == "inverse_noise" else s / s
    expected = 0.5 * (over(weight) * (F - (F + g).detach()).square()).mean()
    torch.testing.assert_close(actual.loss_map["total_loss"].double(), expected, rtol=1e-4, atol=0)
    expected.backward()
    assert not gradients(bundle)["teacher"]
    for ours, theirs in zip(grads, gradients(bundle)["student"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-6)


@given(
    t=st.floats(0, 1000),
    step=st.floats(0.01, 10),
    coefficients=st.tuples(*[st.floats(-2, 2) for _ in range(3)]),
)
def test_a_difference_is_the_derivative_of_a_square_but_at_the_ends(t, step, coefficients):
    """Of a x + b s + c s^2 along dx/ds = v it is a v + b + 2 c s exactly; where the interval is cut
    off at 0 or 1000, at the middle of what is left."""
    a, b, c = coefficients
    x, v = (torch.full((1, 1, 1, 1, 1), n, dtype=torch.float64) for n in (0.7, -1.3))
    actual = finite_difference(
        lambda x, t: a * x + over(b * t / 1000 + c * (t / 1000) ** 2),
        x, torch.tensor([t], dtype=torch.float64), v, step,
    )  # fmt: skip
    middle = (min(t + step, 1000) + max(t - step, 0)) / 2000
    assert float(actual) == pytest.approx(a * -1.3 + b + 2 * c * middle, abs=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_a_difference_gives_the_loss_of_the_exact_derivative(seed: int):
    """Loss, tangent and gradient of both, with the same draws; what was seen is below 1e-5."""
    results = {}
    for options in ({}, {"derivative": "finite_difference", "difference": 0.3}):
        bundle = toy_bundle(student=1 + seed, teacher=7 + seed)
        time = TimeSampling(t_min=1, t_max=1000)
        form = Continuous(tangent_warmup=0, time=time, **options)
        method = build(bundle=bundle, seed=seed, continuous=form)
        result = method.single_train_step(toy_batch(6, seed=seed), 1)
        result.loss_map["total_loss"].backward()
        gradient = torch.cat([g.flatten() for g in gradients(bundle)["student"]])
        results[form.derivative] = result, gradient
        assert sum(call.with_gradient for call in method.adapter.calls) == 1
    (exact, gradient), (near, near_gradient) = results.values()
    losses = (result.loss_map["total_loss"] for result in (near, exact))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    tangents = (result.outputs["tangent_rms"] for result in (near, exact))
    torch.testing.assert_close(*tangents, rtol=1e-5, atol=0)
    assert (near_gradient - gradient).norm() < 1e-4 * gradient.norm()


def test_what_a_derivative_needs_of_the_student_is_checked():
    """Forward mode: kernels that have a rule. Differences: more digits than 16 bits have."""

    def problems(derivative, **student):
        run = PlannedRun(
            roles={"student": RoleSpec(name="student", path="./x", trainable=True, **student)}
        )
        form = Continuous(derivative=derivative)
        return [(".".join(p.path), p.message) for p in form_problems(form, run)]

    assert not problems("jvp", attention_backend="_native_flash", precision="bf16")
    ((path, message),) = problems("jvp", attention_backend="flash")
    assert path == "continuous.derivative"
    assert "Set derivative: finite_difference" in message
    assert not problems("finite_difference", attention_backend="flash")
    ((path, message),) = problems("finite_difference", precision="bf16")
    assert path == "continuous.derivative"
    assert "Set derivative: jvp, or precision: fp32" in message


def test_at_the_beginning_of_the_warmup_it_is_the_teachers_velocity():
    """And at its end all of the derivative: the shares are those of the update."""
    assert [Continuous(tangent_warmup=4).warmup_at(n) for n in (1, 2, 4, 9)] == [
        0.25,
        0.5,
        1.0,
        1.0,
    ]
    assert NOW.warmup_at(1) == 1.0
    method = build(continuous=Continuous(tangent_warmup=10**9), guidance_scale=1.0)
    batch = toy_batch(3)
    result = method.single_train_step(batch, 1)
    distance = result.outputs["teacher_x0"] - result.outputs["student_x0"]
    call = next(c for c in method.adapter.calls if c.with_gradient)
    s = torch.tensor(call.t) / 1000
    g = over((1 - s) * (s**2 + (1 - s) ** 2).sqrt() / s) * -distance
    torch.testing.assert_close(result.outputs["tangent_rms"], g.square().mean().sqrt())


def test_a_derivative_that_is_not_finite_leaves_its_sample_out():
    g = torch.randn(3, *LATENT_SHAPE)
    alone = normalised_tangent(g[:1], 0.1)
    g[1, 0, 0, 0, 0], g[2, 0, 0, 0, 0] = float("nan"), float("inf")
    direction = normalised_tangent(g, 0.1)
    torch.testing.assert_close(direction[:1], alone)
    assert not direction[1:].any()
    assert float(alone.square().mean()) == pytest.approx(1.0, rel=0.05)


def test_frames_that_the_condition_gives_count_for_nothing():
    g = torch.randn(2, *LATENT_SHAPE)
    trained = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1, 1)
    direction = normalised_tangent(g, 0.1, trained)
    assert not direction[:, :, 0].any()
    torch.testing.assert_close(direction[:, :, 1:], normalised_tangent(g[:, :, 1:], 0.1))
    a, b = torch.randn(2, *LATENT_SHAPE), torch.randn(2, *LATENT_SHAPE)
    for c in (None, 0.01):
        torch.testing.assert_close(
            x0_distance(a, b, c, trained), x0_distance(a[:, :, 1:], b[:, :, 1:], c)
        )


# -- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "options", "message"), [
    (Discrete, {"steps": 0}, "0 must be at least 1.*LCM has 50"),
    (Discrete, {"skip": 0}, "0 must be at least 1"),
    (Discrete, {"steps": 4, "skip": 5}, r"5 is more than the grid's steps \(4\)"),
    (Discrete, {"loss": "l1"}, "'l2', 'huber'.*got 'l1'"),
    (Discrete, {"loss": "l2", "huber_c": 0.1}, "0.1 has no effect: loss: l2"),
    (Discrete, {"huber_c": 0.0}, "0.0 must be above 0"),
    (Discrete, {"shift": 0.0}, "0.0 must be above 0"),
    (Continuous, {"tangent_warmup": -1}, "-1 must be at least 0"),
    (Continuous, {"tangent_c": 0.0}, "0.0 must be above 0"),
    (Continuous, {"difference": 0.5}, "0.5 has no effect: derivative: jvp takes no difference"),
    (Continuous, {"derivative": "finite_difference", "difference": 0.001}, "lost in rounding"),
    (ConsistencyConfig, {"discrete": Discrete(), "continuous": NOW}, "both stated"),
    (ConsistencyConfig, {"guidance_scale": -1.0}, "away from the prompt"),
    (ConsistencyConfig, {"student_sampler": SamplerSpec(steps=4, guidance=3.0)}, "3.0 must be 1"),
])  # fmt: skip
def test_the_error_of_a_wrong_option_has_the_reason(config, options, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        config(**options)


def test_roles_and_capabilities_follow_the_options():
    assert isinstance(ConsistencyConfig().form, Discrete)
    assert ConsistencyConfig().roles[-1].name == "teacher"
    several = ConsistencyConfig(teachers={"a": TeacherTerm(weight=1.0)})
    assert [need.name for need in several.roles] == ["student", "a"]
    able = attrs.evolve(CAPABILITIES, supports_jvp=False)
    build(able=able)
    with pytest.raises(CapabilityError, match="supports_jvp"):
        build(able=able, continuous=NOW)
    differences = Continuous(derivative="finite_difference")
    build(able=able, continuous=differences)
    assert RCMConfig(continuous=differences).capabilities.count("supports_jvp") == 0
    with pytest.raises(CapabilityError, match="supports_cfg"):
        build(able=attrs.evolve(CAPABILITIES, supports_cfg=False))
    assert not ConsistencyConfig(guidance_scale=1.0).needs_negative
