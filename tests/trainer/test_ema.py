"""The average of weights."""

from __future__ import annotations

import pytest
import torch
from distill_protocols import CheckpointError
from distill_trainer import EmaConfig, ExponentialMovingAverage
from hypothesis import given
from hypothesis import strategies as st
from torch import nn


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def _fill(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def _states_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@given(
    decay=st.floats(0, 0.999),
    updates=st.integers(0, 20),
    start=st.floats(-3, 3),
    then=st.floats(-3, 3),
)
def test_constant_weights_give_the_closed_form(
    decay: float, updates: int, start: float, then: float
) -> None:
    net = _net()
    _fill(net, start)
    average = ExponentialMovingAverage(net, decay)
    _fill(net, then)
    for _ in range(updates):
        average.update(net)
    expected = decay**updates * start + (1 - decay**updates) * then
    value = average.state_dict()["0.weight"]
    torch.testing.assert_close(value, torch.full_like(value, expected), rtol=1e-5, atol=2e-5)
    assert average.updates == updates


@given(half_life=st.floats(0.5, 1e4))
def test_after_a_half_life_half_is_left(half_life: float) -> None:
    config = EmaConfig(roles=("student",), half_life=half_life)
    assert config.decay_per_move**half_life == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"says the same as decay .* Leave one of them out"):
        EmaConfig(roles=("student",), decay=0.9, half_life=half_life)


def test_up_to_start_update_it_copies() -> None:
    net = _net()
    average = ExponentialMovingAverage(net, 0.5, start_update=2)
    for value in (1.0, 2.0):
        _fill(net, value)
        average.update(net)
        assert average.state_dict()["0.weight"].unique().tolist() == [value]
    _fill(net, 4.0)
    average.update(net)
    assert average.state_dict()["0.weight"].unique().tolist() == [3.0]


def test_bf16_weights_are_averaged_in_fp32() -> None:
    net = nn.Linear(2, 2).bfloat16()
    _fill(net, 1.0)
    average = ExponentialMovingAverage(net, 0.999)
    _fill(net, 2.0)
    average.update(net)
    # In bf16 the step of 0.001 would be lost.
    assert average.state_dict()["weight"].dtype == torch.float32
    torch.testing.assert_close(average.state_dict()["weight"], torch.full((2, 2), 1.001))


def test_buffers_are_copied_not_averaged() -> None:
    net = _net()
    average = ExponentialMovingAverage(net, 0.9)
    net(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    average.update(net)
    saved = average.state_dict()
    assert torch.equal(saved["1.running_mean"], net.state_dict()["1.running_mean"])
    assert saved["1.num_batches_tracked"].item() == 1


@pytest.mark.parametrize("fails", [False, True])
def test_swapping_in_restores_bit_for_bit(fails: bool) -> None:
    net = _net()
    average = ExponentialMovingAverage(net, 0.9)
    _fill(net, 1 / 3)
    average.update(net)
    live = {name: value.clone() for name, value in net.state_dict().items()}
    try:
        with average.swapped_in(net):
            state = net.state_dict()
            averaged = average.state_dict()
            assert torch.equal(state["0.weight"], averaged["0.weight"])
            assert not torch.equal(state["0.weight"], live["0.weight"])
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert _states_equal(dict(net.state_dict()), live)


def test_state_comes_back_and_another_architecture_is_refused() -> None:
    net = _net()
    first = ExponentialMovingAverage(net, 0.9)
    _fill(net, 2.0)
    first.update(net)
    second = ExponentialMovingAverage(_net(), 0.9)
    second.load_state_dict(first.state_dict())
    assert second.updates == 1
    assert _states_equal(second.state_dict(), first.state_dict())
    with pytest.raises(CheckpointError, match="weight"):
        ExponentialMovingAverage(nn.Linear(3, 3), 0.9).load_state_dict(first.state_dict())
    other = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with pytest.raises(CheckpointError, match=r"0\.weight"):
        ExponentialMovingAverage(other, 0.9).load_state_dict(first.state_dict())
