"""Several teachers in the place of one: their weighted sum, their guidances, their refusals."""

from __future__ import annotations

import attrs
import pytest
import torch
from distill_conformance.toy import (
    CAPABILITIES,
    LATENT_SHAPE,
    TEXT_DIM,
    ToyAdapter,
    ToyConditioning,
    toy_batch,
)
from distill_methods import (
    DMD2Config,
    DMD2Method,
    TeacherOnlyConfig,
    TeacherOnlyMethod,
    TeacherTerm,
    TimeSampling,
)
from distill_methods.teachers.ensemble import Teachers
from distill_protocols import (
    Condition,
    ContractError,
    PlannedRun,
    RandomStreams,
    RoleError,
    RoleSpec,
    SamplerSpec,
)
from toy_roles import gradients, toy_bundle

TEACHERS = {
    "near": TeacherTerm(weight=0.75),
    "far": TeacherTerm(weight=0.5, guidance_scale=2.0),
    "bad": TeacherTerm(weight=-0.25, guidance_scale=1.0),
}
NAMES = ("student", *TEACHERS, "critic")


class Routed(ToyAdapter):
    """Roles of two experts, which are one network here."""

    @property
    def experts(self):
        return self

    def expert_ranges(self, *roles: str):
        return ((0.0, 500.0), (500.0, 1000.0))


def bundle(*names: str):
    roles = toy_bundle(**{name: i for i, name in enumerate(names)})
    for name in TEACHERS:
        if name in roles.roles:
            role = roles.roles[name]
            role.set_trainable(False)
            role.trainable = False
            role.optimizers.clear()
            role.schedulers.clear()
    return roles


def build(method, config, *, names=NAMES, adapter=ToyAdapter, able=CAPABILITIES):
    roles = bundle(*names)
    return method(
        roles,
        adapter(roles, capabilities=able),
        config,
        conditioning=ToyConditioning(),
        streams=RandomStreams(0),
    )


def mixed(method, x_t, t, text, guidance: float, negative: float = -0.5) -> torch.Tensor:
    """sum_i a_i (u + w_i (c - u)) in v, by hand."""
    s = (t / 1000).view(-1, 1, 1, 1, 1)
    total = torch.zeros_like(x_t)
    for name, weight, w in (("near", 0.75, guidance), ("far", 0.5, 2.0), ("bad", -0.25, 1.0)):
        net = method.bundle[name].modules["transformer"]
        c, u = net(x_t, t, text), net(x_t, t, torch.full_like(text, negative))
        total += weight * (x_t - s * (u + w * (c - u)))
    return total


def test_dmd2_follows_the_weighted_sum_of_guided_teachers():
    config = DMD2Config(
        teachers=TEACHERS, real_score_guidance_scale=3.0, generator_update_interval=2
    )
    method = build(DMD2Method, config)
    batch = toy_batch(3)
    result = method.single_train_step(batch, 2)
    streams, x = RandomStreams(0), result.outputs["student_x0"]
    u = streams.rows("dmd2.student.t", 3).uniform()
    t = (1000 * 5 * u / (1 + 4 * u)).clamp(20, 980)
    noise = streams.rows("dmd2.student.noise", 3).normal(LATENT_SHAPE)
    s = (t / 1000).view(-1, 1, 1, 1, 1)
    x_t, text = (1 - s) * x + s * noise, batch.cond.tensors["text"]
    real = mixed(method, x_t, t, text, 3.0)
    torch.testing.assert_close(result.outputs["teacher_x0"], real.detach(), rtol=1e-4, atol=1e-5)
    result.loss_map["total_loss"].backward()
    assert {name for name, g in gradients(method.bundle).items() if g} == {"student"}


class Negatives(ToyConditioning):
    def negatives(self) -> Condition:
        return Condition({"text": torch.tensor([-0.5, 0.25])[:, None].expand(2, TEXT_DIM)})


def test_each_sample_draws_one_of_several_negatives():
    roles = bundle(*NAMES)
    method = DMD2Method(
        roles,
        ToyAdapter(roles, capabilities=CAPABILITIES),
        DMD2Config(real_score_guidance_scale=3.0, teachers=TEACHERS, generator_update_interval=2),
        conditioning=Negatives(),
        streams=RandomStreams(0),
    )
    teachers = Teachers(method.context, method.config)
    batch, rows = toy_batch(8), []
    x_t, t, text = batch.clean_latents, torch.full((8,), 500.0), batch.cond.tensors["text"]
    for _ in range(2):
        given = teachers.predict(x_t, t, batch.cond, pred_type="x0")
        (purpose,) = [key for key in method.streams.state_dict() if key.endswith(".negative")]
        both = [mixed(method, x_t, t, text, 3.0, negative=value) for value in (-0.5, 0.25)]
        matches = [((given - one).flatten(1).abs().amax(dim=1) < 1e-4) for one in both]
        assert torch.equal(matches[0], ~matches[1])  # of each row one or the other
        rows.append(matches[0].tolist())
    assert 0 < sum(rows[0]) < 8
    assert rows[0] != rows[1]
    streams = RandomStreams(0)
    streams.load_state_dict({purpose: torch.tensor(0)})
    drawn = streams.rows(purpose.removeprefix("rows/"), 8).integers(2)
    assert (drawn == 0).tolist() == rows[0]


def test_one_negative_is_not_drawn():
    method = build(
        DMD2Method, DMD2Config(generator_update_interval=2), names=("student", "teacher", "critic")
    )
    method.single_train_step(toy_batch(2), 2)
    assert not [key for key in method.streams.state_dict() if key.endswith(".negative")]


def test_teacher_only_learns_the_weighted_sum():
    """In v, as weights that add up to 1 mix v as they mix x0."""
    config = TeacherOnlyConfig(
        teachers=TEACHERS, guidance_scale=3.0, time=TimeSampling(t_min=200), target="x0"
    )
    method = build(TeacherOnlyMethod, config, names=NAMES[:-1])
    batch = toy_batch(3)
    actual = method.single_train_step(batch, 1)
    streams = RandomStreams(0)
    t = (1000 * streams.rows("teacher_only.t", 3).uniform()).clamp(200, 1000)
    noise = streams.rows("teacher_only.noise", 3).normal(LATENT_SHAPE)
    s, text = (t / 1000).view(-1, 1, 1, 1, 1), batch.cond.tensors["text"]
    x_t = (1 - s) * (batch.latents - 0.5) / 2.0 + s * noise
    student = x_t - s * method.bundle["student"].modules["transformer"](x_t, t, text)
    expected = (student - mixed(method, x_t, t, text, 3.0)).square().mean()
    torch.testing.assert_close(actual.loss_map["total_loss"], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("low", "expert"), [(100.0, "low"), (600.0, "high")])
def test_each_expert_has_its_teachers_guidance(low: float, expert: str):
    """Own before common, and the low one's own before the high one's."""
    config = TeacherOnlyConfig(
        guidance_scale=3.0,
        guidance_scale_2=4.0,
        teachers={
            "near": TeacherTerm(weight=0.5),
            "far": TeacherTerm(weight=0.25, guidance_scale=5.0, guidance_scale_2=6.0),
            "bad": TeacherTerm(weight=0.25, guidance_scale=7.0),
        },
        time=TimeSampling(t_min=low, t_max=low + 1),
    )
    able = attrs.evolve(CAPABILITIES, supports_expert_routing=True)
    method = build(TeacherOnlyMethod, config, names=NAMES[:-1], adapter=Routed, able=able)
    method.single_train_step(toy_batch(2), 1)
    guidance_of = {c.role: c.cfg for c in method.adapter.calls if c.role != "student"}
    expected = {"high": (3.0, 5.0, 7.0), "low": (4.0, 6.0, 7.0)}[expert]
    assert guidance_of == dict(zip(("near", "far", "bad"), expected, strict=True))


def test_a_second_guidance_without_a_second_expert_is_refused():
    with pytest.raises(ContractError, match="guidance_scale_2: 4 is the guidance of a second exp"):
        build(
            TeacherOnlyMethod, TeacherOnlyConfig(guidance_scale_2=4.0), names=("student", "teacher")
        )


def planned(**experts: bool) -> PlannedRun:
    return PlannedRun(
        roles={n: RoleSpec(name=n, path="./x", trainable=False) for n in experts},
        experts=frozenset(n for n, two in experts.items() if two),
    )


ONE = {"teachers": {"a": TeacherTerm(weight=1.0, guidance_scale_2=2.0)}}
TWO = {
    "teachers": {
        "a": TeacherTerm(weight=0.5, guidance_scale=2.0),
        "b": TeacherTerm(weight=0.5),
    }
}


@pytest.mark.parametrize(("options", "run", "keys"), [
    ({"guidance_scale_2": 3.0}, planned(teacher=True), []),
    ({"guidance_scale_2": 3.0}, planned(teacher=False), ["guidance_scale_2"]),
    ({"guidance_scale_2": 3.0}, attrs.evolve(planned(teacher=False), experts=None), []),
    (ONE, planned(a=True), []),
    (ONE, planned(a=False), ["teachers.a.guidance_scale_2"]),
    (TWO, planned(a=False, b=False), []),
    ({"guidance_scale_2": 3.0} | TWO, planned(a=False, b=True), []),
    ({"guidance_scale_2": 3.0} | TWO, planned(a=True, b=False), ["guidance_scale_2"]),
])  # fmt: skip
def test_a_guidance_that_is_never_used_is_a_problem_of_the_file(options, run, keys):
    assert [".".join(p.path) for p in TeacherOnlyConfig(**options).problems(run)] == keys
    renamed = {"guidance_scale_2": "real_score_guidance_scale_2"}
    ours = {renamed.get(k, k): v for k, v in options.items()}
    keys = [renamed.get(k, k) for k in keys]
    assert [".".join(p.path) for p in DMD2Config(**ours).problems(run)] == keys


@pytest.mark.parametrize(("teachers", "message"), [
    ({"a": 0.5, "b": 0.6}, r"a 0.5, b 0.6\) add up to 1.1 and must to 1"),
    ({"a": float("nan")}, "add up to nan"),
    ({"student": 1.0}, "'student' is a role that the method itself gives"),
    ({"critic": 1.0}, "'critic' is a role that the method itself gives"),
])  # fmt: skip
@pytest.mark.parametrize("config", [DMD2Config, TeacherOnlyConfig])
def test_wrong_teachers_are_refused(config, teachers, message):
    with pytest.raises(ValueError, match=message):
        config(teachers={name: TeacherTerm(weight=w) for name, w in teachers.items()})


def test_roles_are_those_of_the_teachers():
    config = TeacherOnlyConfig(teachers=TEACHERS)
    assert [(r.name, r.trainable) for r in config.roles] == [
        ("student", True), ("near", False), ("far", False), ("bad", False),
    ]  # fmt: skip
    assert config.needs_negative
    plain = {n: attrs.evolve(t, guidance_scale=1.0) for n, t in TEACHERS.items()}
    assert not TeacherOnlyConfig(teachers=plain).needs_negative
    with pytest.raises(RoleError, match=r"missing role\(s\): far, bad"):
        build(TeacherOnlyMethod, config, names=("student", "near"))


def test_a_trainable_teacher_among_several_is_refused():
    roles = toy_bundle(student=1, near=2, far=3, bad=4)
    with pytest.raises(RoleError, match="'near' is trainable"):
        TeacherOnlyMethod(
            roles,
            ToyAdapter(roles),
            TeacherOnlyConfig(teachers=TEACHERS),
            conditioning=ToyConditioning(),
        )


def test_the_error_without_a_critic_explains_the_role():
    message = r"missing role\(s\): critic.*critic: .*own clips.*teacher_only"
    with pytest.raises(RoleError, match=message):
        build(DMD2Method, DMD2Config(teachers=TEACHERS), names=NAMES[:-1])
    assert all(not need.reason for need in TeacherOnlyConfig().roles)


def test_the_students_clips_cannot_be_made_with_guidance():
    spec = SamplerSpec(steps=4, guidance=3.0)
    with pytest.raises(ValueError, match=r"guidance 3.0 must be 1 with input: student"):
        TeacherOnlyConfig(input="student", student_sampler=spec)
    assert TeacherOnlyConfig(student_sampler=spec).needs_negative


@pytest.mark.parametrize(("t", "w"), [(500.0, 3.0), (499.99997, 4.0)])
def test_at_the_boundary_itself_it_is_the_high_experts_guidance(t: float, w: float):
    config = TeacherOnlyConfig(guidance_scale=3.0, guidance_scale_2=4.0)
    able = attrs.evolve(CAPABILITIES, supports_expert_routing=True)
    names = ("student", "teacher")
    method = build(TeacherOnlyMethod, config, names=names, adapter=Routed, able=able)
    x, batch = toy_batch(2).latents, toy_batch(2)
    Teachers(method.context, config).predict(x, torch.full((2,), t), batch.cond)
    assert [call.cfg for call in method.adapter.calls] == [w]
