"""The contracts: value objects, named generators, stepping, plugin look-up."""

from __future__ import annotations

import itertools
from importlib.metadata import EntryPoint

import pytest
import torch
from distill_protocols import (
    Capabilities,
    CapabilityError,
    Condition,
    DataError,
    ModelBundle,
    PluginError,
    RandomStreams,
    RoleError,
    RoleHandle,
    SamplerSpec,
    StepResult,
    shift_sigma,
)
from distill_runtime import DistillMethod, load_plugin, plugins
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

shifts = st.floats(0.05, 20)
unit = st.floats(0, 1)


@given(unit, unit, shifts)
def test_shift_is_monotone_and_fixes_the_ends(a, b, k):
    assert shift_sigma(0.0, k) == 0
    assert shift_sigma(1.0, k) == pytest.approx(1)
    low, high = sorted((a, b))
    assert shift_sigma(low, k) <= shift_sigma(high, k) + 1e-12


@given(unit, shifts, shifts)
def test_shifts_compose(u, a, b):
    assert shift_sigma(shift_sigma(u, b), a) == pytest.approx(shift_sigma(u, a * b), abs=1e-12)


def test_published_warps():
    # [1000, 750, 500, 250] warped with 5 and with 8, as algorithms published them.
    five = [1000 * s for s in SamplerSpec(steps=4, shift=5).sigmas()]
    assert five == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-3)
    eight = [1000 * s for s in SamplerSpec(steps=4, shift=8).sigmas()]
    assert eight == pytest.approx([1000, 960, 888.8889, 727.2727], abs=1e-3)


@given(st.integers(1, 50), shifts)
def test_sigmas_fall_from_one(steps, shift):
    sigmas = SamplerSpec(steps=steps, shift=shift).sigmas()
    assert len(sigmas) == steps
    assert sigmas[0] == pytest.approx(1)
    assert all(a > b > 0 for a, b in itertools.pairwise(sigmas))


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"steps": 2, "shift": 0.0},
        {"steps": 2, "guidance": -1.0},
        {"steps": 2, "timesteps": (1000.0,)},
        {"steps": 2, "timesteps": (500.0, 750.0)},
        {"steps": 1, "timesteps": (1001.0,)},
    ],
)
def test_wrong_specs_are_refused(bad):
    with pytest.raises(ValueError, match=r"must|there"):
        SamplerSpec(**bad)


def test_guidance_doubles_the_calls():
    assert SamplerSpec(steps=4).calls_per_clip == 4
    assert SamplerSpec(steps=4, guidance=3.0).calls_per_clip == 8


def draw(streams: RandomStreams, purpose: str, shared: bool = False) -> list[float]:
    return torch.rand(3, generator=streams.get(purpose, shared=shared)).tolist()


@given(st.integers(0, 2**40), st.text(max_size=8), st.text(max_size=8))
def test_a_purpose_draws_the_same_whatever_else_drew_first(seed, a, b):
    alone = draw(RandomStreams(seed), a)
    both = RandomStreams(seed)
    if a != b:
        draw(both, b)
    assert draw(both, a) == alone


def test_ranks_differ_unless_a_purpose_is_shared():
    ranks = [RandomStreams(3, rank=r) for r in range(2)]
    assert draw(ranks[0], "noise") != draw(ranks[1], "noise")
    assert draw(ranks[0], "exit", shared=True) == draw(ranks[1], "exit", shared=True)


def test_streams_resume_where_they_were():
    streams = RandomStreams(1)
    draw(streams, "a")
    state = streams.state_dict()
    expected = [draw(streams, "a"), draw(streams, "b")]
    fresh = RandomStreams(1)
    draw(fresh, "b")
    fresh.load_state_dict(state)
    assert [draw(fresh, "a"), draw(fresh, "b")] == expected


def test_global_generator_is_left_alone():
    before = torch.get_rng_state()
    draw(RandomStreams(1), "a")
    assert torch.equal(before, torch.get_rng_state())


def test_condition_rows():
    cond = Condition({"text": torch.arange(6.0).reshape(3, 2)})
    assert len(cond) == 3
    assert cond[1:2].tensors["text"].tolist() == [[2, 3]]
    assert len(Condition.cat([cond, cond])) == 6
    assert len(cond[:1].expand(4)) == 4
    with pytest.raises(DataError, match="3 rows cannot be expanded to 5"):
        cond.expand(5)
    with pytest.raises(DataError, match="cannot be joined"):
        Condition.cat([cond, Condition({"image": torch.zeros(1)})])


def test_capabilities_name_what_is_missing():
    have = Capabilities(supports_cfg=True)
    assert have.missing(["supports_cfg", "pred:v", "pred:x0"]) == ("pred:x0",)
    with pytest.raises(CapabilityError, match="dmd2 needs supports_features"):
        have.require(["supports_features"], by="dmd2")
    with pytest.raises(CapabilityError, match="'supports_cgf' is no capability"):
        have.require(["supports_cgf"], by="dmd2")


def handle(name: str, *, trainable: bool, precision: str = "fp32") -> RoleHandle:
    role = RoleHandle(
        name=name,
        modules={"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)},
        trainable=trainable,
        precision=precision,  # type: ignore[arg-type]
    )
    if trainable:
        for key, module in role.modules.items():
            role.optimizers[key] = torch.optim.SGD(module.parameters(), lr=1.0)
            role.schedulers[key] = torch.optim.lr_scheduler.LambdaLR(
                role.optimizers[key], lambda n: 1 / (n + 1)
            )
    return role


class Turns(DistillMethod[None]):
    """A method that steps the roles of a table; its loss is the sum of the turn's weights."""

    required_roles = ("student", "critic")
    frozen_roles = ("teacher",)
    table: tuple[tuple[str, ...], ...] = ()

    def single_train_step(self, batch, iteration):
        roles = self.table[iteration - 1]
        total = sum(
            (
                p.sum()
                for r in roles
                for m in self.bundle[r].modules.values()
                for p in m.parameters()
            ),
            start=torch.zeros((), requires_grad=True) + 0,
        )
        return StepResult({"total_loss": total}, {})

    def get_optimizers(self, iteration):
        return self.optimizers_of(*self.table[iteration - 1])


def turns_method(table, precision: str = "fp32") -> Turns:
    bundle = ModelBundle(
        {n: handle(n, trainable=True, precision=precision) for n in ("student", "critic")}
    )
    method = Turns(bundle, None)
    method.table = table
    return method


turn = st.sampled_from([(), ("student",), ("critic",), ("student", "critic")])


@given(st.lists(turn, min_size=1, max_size=12))
def test_a_scheduler_steps_exactly_with_its_optimizer(table):
    method = turns_method(tuple(table))
    for iteration in range(1, len(table) + 1):
        method.single_train_step(None, iteration).loss_map["total_loss"].backward()
        stepped = method.optimizers_schedulers_step(iteration)
        method.optimizers_zero_grad(iteration)
        assert set(stepped) == set(method.get_optimizers(iteration))
        assert set(method.get_lr_schedulers(iteration)) == set(stepped)
    for role in ("student", "critic"):
        expected = sum(role in row for row in table)
        for key in ("a", "b"):
            assert method.update_counts[f"{role}.{key}"] == expected
            assert method.scheduler_dict[f"{role}.{key}"].last_epoch == expected


def test_an_overflow_leaves_out_optimizer_and_scheduler_of_that_module_only():
    method = turns_method((("student", "critic"),) * 2, precision="fp16")
    assert method.grad_scaler.is_enabled()
    for iteration in (1, 2):
        loss = method.single_train_step(None, iteration).loss_map["total_loss"]
        method.grad_scaler.scale(loss).backward()
        if iteration == 2:
            method.model_dict["critic.b"].weight.grad.fill_(float("inf"))
        method.unscale_gradients(iteration)
        stepped = method.optimizers_schedulers_step(iteration)
        method.optimizers_zero_grad(iteration)
    assert "critic.b" not in stepped
    assert method.update_counts == {"student.a": 2, "student.b": 2, "critic.a": 2, "critic.b": 1}
    assert {k: s.last_epoch for k, s in method.scheduler_dict.items()} == method.update_counts
    again = turns_method((("student",),), precision="fp16")
    again.load_state_dict(method.state_dict())
    assert again.update_counts == method.update_counts
    assert again.grad_scaler.get_scale() == method.grad_scaler.get_scale()


def test_roles_are_checked_when_a_method_is_made():
    bundle = ModelBundle({"student": handle("student", trainable=True)})
    with pytest.raises(RoleError, match=r"missing role\(s\): critic; this run has: student"):
        Turns(bundle, None)
    bundle.roles["critic"] = handle("critic", trainable=True)
    bundle.roles["teacher"] = handle("teacher", trainable=True)
    with pytest.raises(RoleError, match="'teacher' is trainable"):
        Turns(bundle, None)


def test_a_frozen_role_stays_frozen():
    role = handle("teacher", trainable=False)
    assert not any(p.requires_grad for m in role.modules.values() for p in m.parameters())
    with pytest.raises(RoleError, match="'teacher' is frozen"):
        role.set_trainable(True)
    with pytest.raises(RoleError, match="keeps no EMA of a, b"), role.averaged():
        pass


def test_freezing_a_role_restores_the_mode_of_each_module():
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    role = RoleHandle(name="student", modules={"net": net}, trainable=True)
    net[1].eval()
    net[0].bias.requires_grad_(False)
    with role.frozen():
        assert not any(part.training for part in net.modules())
        assert not any(parameter.requires_grad for parameter in net.parameters())
    assert [part.training for part in net.modules()] == [True, True, False, False, False]
    assert [p.requires_grad for p in net.parameters()] == [True, False, True, True]


def test_unknown_plugins_are_answered_with_the_known_ones():
    with pytest.raises(
        PluginError, match=r"unknown method 'dmd3'; did you mean 'dmd2'\? \(installed: .*dmd2, "
    ):
        load_plugin("distill.methods", "dmd3")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("x", "no_such_module:plugin")], "does not import"),
        ([("x", "math:pi")], "is a float, not an instance of MethodPlugin"),
        ([("x", "math:pi"), ("x", "math:e")], "is offered twice"),
    ],
)
def test_broken_plugins_are_refused_with_the_reason(monkeypatch, entries, message):
    group = "distill.methods"
    entry_points = [EntryPoint(name=n, value=v, group=group) for n, v in entries]
    monkeypatch.setattr(plugins, "entry_points", lambda group: entry_points)
    with pytest.raises(PluginError, match=message):
        load_plugin(group, "x")
