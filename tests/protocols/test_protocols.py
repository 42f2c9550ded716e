"""The contracts: value objects, named generators, roles."""

from __future__ import annotations

import itertools

import numpy
import pytest
import torch
from distill_protocols import (
    Capabilities,
    CapabilityError,
    Condition,
    DataError,
    DynamicShift,
    LoraSpec,
    RandomStreams,
    RoleError,
    RoleHandle,
    SamplerSpec,
    TensorPlan,
    shift_sigma,
)
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


@given(st.integers(1, 50), shifts)
def test_unipc_walks_the_grid_of_its_scheduler(steps, shift):
    spec = SamplerSpec(steps=steps, shift=shift, solver="unipc")
    grid = numpy.linspace(1, 1 / 1000, steps + 1)[:-1]
    assert spec.sigmas() == tuple(shift_sigma(u, shift) for u in grid.tolist())


def test_the_second_time_of_unipc_is_below_its_first():
    SamplerSpec(steps=1, shift=1e7, solver="unipc")
    SamplerSpec(steps=2, shift=1e5, solver="unipc")
    for steps in (2, 3):
        with pytest.raises(ValueError, match=r"the second time, 999\.9999\d*, must be below"):
            SamplerSpec(steps=steps, shift=1e7, solver="unipc")


@pytest.mark.parametrize("terminal", [-0.1, 1.1])
def test_the_last_noise_level_of_a_dynamic_shift_is_one(terminal):
    assert DynamicShift(terminal=0.25).sigmas(4, 300)[-1] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="it is a noise level"):
        DynamicShift(terminal=terminal)


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


def test_a_frozen_role_stays_frozen():
    role = RoleHandle(name="teacher", modules={"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
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


def test_what_training_moves_of_a_role():
    net = nn.Linear(2, 2)
    names = {"net": frozenset({"weight"})}
    role = RoleHandle(name="student", modules={"net": net}, trainable=True, trained=names)
    assert role.trained_parameters("net") == {"weight": net.weight}
    assert [parameter.requires_grad for parameter in (net.weight, net.bias)] == [True, False]
    all_of_it = RoleHandle(name="critic", modules={"net": net}, trainable=True)
    assert all_of_it.trained_parameters("net") == {"weight": net.weight, "bias": net.bias}


def test_sizes_and_scales():
    plan = TensorPlan(name="w", shape=(2, 3), dtype=torch.bfloat16)
    assert (plan.numel, plan.nbytes) == (6, 12)
    assert LoraSpec(rank=4).scale == 1
    assert LoraSpec(rank=4, alpha=2).scale == 0.5
