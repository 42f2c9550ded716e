"""Other optimizer settings in mid-run: what stays, what holds from then on, and where it ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import pytest
import torch
from checkpoint.test_resume import find_differences
from distill_checkpoint import ChangesConfig, CheckpointConfig, CheckpointManager
from distill_protocols import CheckpointError, ModelBundle, derive_seed
from distill_runfile.structure import to_plain
from distill_trainer import (
    DistillTrainer,
    OptimizerConfig,
    ScheduleConfig,
    build_optimizers,
    schedule_factor,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toy_trainer import Alternating, linear_role, training

TOTAL = 12
FIRST = OptimizerConfig(
    lr=0.01,
    weight_decay=0.1,
    betas=(0.5, 0.9),
    schedule=ScheduleConfig(name="cosine", warmup_steps=1, final_ratio=0.1),
)
RESTART = ("optimizers.student",)


class Data:
    """Batches that are functions of their position."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            generator = torch.Generator().manual_seed(derive_seed(3, self.position))
            self.position += 1
            yield torch.randn(2, 3, generator=generator)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


def count_updates(role: str, interval: int, after: int = 0) -> int:
    """Count the updates of ``role`` after an iteration of the run."""
    student = TOTAL // interval - after // interval
    return student if role == "student" else TOTAL - after - student


def train(
    folder: Path,
    until: int,
    settings: Mapping[str, OptimizerConfig],
    *,
    interval: int = 2,
    rules: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()),
) -> Alternating:
    """Begin or go on, up to iteration ``until`` of TOTAL, and save there."""
    roles = {name: linear_role(name, seed=i) for i, name in enumerate(settings)}
    for name, config in settings.items():
        build_optimizers(
            roles[name],
            config,
            horizon=lambda after, name=name: count_updates(name, interval, after),
        )
    method = Alternating(ModelBundle(roles), interval)
    file = {"models": {name: {"optimizer": to_plain(c)} for name, c in settings.items()}}
    checkpoints = CheckpointConfig(
        changes=ChangesConfig(added=rules[0], dropped=rules[1]), keep_last=99
    )
    trainer = DistillTrainer(
        training(folder, until), checkpointer=CheckpointManager(checkpoints, folder, file)
    )
    trainer.run(method, Data())
    return method


def moments(method: Alternating) -> dict[str, Any]:
    return {key: o.state_dict()["state"] for key, o in method.optimizer_dict.items()}


def rate(method: Alternating, role: str) -> float:
    return method.optimizer_dict[f"{role}.net"].param_groups[0]["lr"]


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.sampled_from([0.002, 0.5]),
        "weight_decay": st.sampled_from([0.0, 0.3]),
        "eps": st.just(1e-6),
        "schedule": st.builds(
            ScheduleConfig,
            name=st.sampled_from(["cosine", "linear"]),
            warmup_steps=st.integers(0, 3),
            final_ratio=st.sampled_from([0.0, 0.25]),
        )
        | st.just(ScheduleConfig()),
    },
)


@given(stop=st.integers(1, TOTAL - 1), interval=st.integers(1, 3), change=CHANGES)
def test_other_settings_keep_the_moments_and_end_where_the_new_file_says(stop, interval, change):
    with TemporaryDirectory() as name:
        _check_other_settings(Path(name), stop, interval, change)


def _check_other_settings(root: Path, stop: int, interval: int, change: dict[str, Any]) -> None:
    folder = root / "run"
    old = {"student": FIRST, "critic": FIRST}
    new = {"student": attrs.evolve(FIRST, **change), "critic": FIRST}
    before = train(folder, stop, old, interval=interval)
    after = train(folder, stop, new, interval=interval)
    assert find_differences(moments(after), moments(before)) == []
    assert find_differences(after.state_dict(), before.state_dict()) == []
    config, done = new["student"], stop // interval
    horizon = count_updates("student", interval)
    group = after.optimizer_dict["student.net"].param_groups[0]
    assert group["lr"] == config.lr * schedule_factor(config.schedule, done, horizon)
    assert (group["weight_decay"], group["eps"]) == (config.weight_decay, config.eps)
    # Of the role whose settings are the same, nothing has changed.
    same = [m.optimizer_dict["critic.net"].param_groups[0] for m in (before, after)]
    assert same[0]["lr"] == same[1]["lr"]
    end = train(folder, TOTAL, new, interval=interval)
    last = schedule_factor(config.schedule, horizon, horizon)
    assert rate(end, "student") == config.lr * last
    if not change:
        full = train(root / "whole", TOTAL, old, interval=interval)
        for name, role in full.bundle.roles.items():
            own = end.bundle[name].modules["net"].state_dict()
            assert find_differences(own, role.modules["net"].state_dict()) == []
        assert find_differences(moments(end), moments(full)) == []


def test_changed_optimizer_settings_are_logged_in_one_line(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    train(tmp_path, 8, {"student": FIRST, "critic": FIRST})
    train(tmp_path, TOTAL, {"student": attrs.evolve(FIRST, lr=0.002), "critic": FIRST})
    assert [record.getMessage() for record in caplog.records] == [
        "resuming checkpoint-000008: the optimizer of student goes on with lr 0.01 -> 0.002; its "
        "moments and its count of steps stay"
    ]


@pytest.mark.parametrize("change", [{"betas": (0.0, 0.9)}, {"name": "sgd"}])
def test_other_betas_need_a_rule(tmp_path, change):
    train(tmp_path, 8, {"student": FIRST, "critic": FIRST})
    now = {"student": attrs.evolve(FIRST, lr=0.002, **change), "critic": FIRST}
    with pytest.raises(CheckpointError, match=rf"student\.optimizer\.{next(iter(change))} is"):
        train(tmp_path, TOTAL, now)
    train(tmp_path, TOTAL, now, rules=(RESTART, RESTART))


@given(stop=st.integers(1, TOTAL - 2), again=st.integers(0, 3))
def test_a_restarted_schedule_ends_at_the_end(stop, again):
    """Also if the run is stopped once more: the rule has been applied then."""
    with TemporaryDirectory() as name:
        _check_restart(Path(name), stop, again)


def _check_restart(folder: Path, stop: int, again: int) -> None:
    train(folder, stop, {"student": FIRST, "critic": FIRST}, interval=1)
    now = {"student": attrs.evolve(FIRST, betas=(0.0, 0.9)), "critic": FIRST}
    rules = (RESTART, RESTART)
    restarted = train(folder, stop, now, interval=1, rules=rules)
    assert moments(restarted)["student.net"] == {}
    assert rate(restarted, "student") == FIRST.lr / 2, "its warm-up is its own"
    for until in (min(stop + again, TOTAL - 1), TOTAL):
        end = train(folder, until, now, interval=1, rules=rules)
    assert end.scheduler_dict["student.net"].last_epoch == TOTAL - stop
    assert rate(end, "student") == pytest.approx(FIRST.lr * 0.1)


def test_a_role_that_is_added_has_a_horizon_of_its_own(tmp_path):
    train(tmp_path, 6, {"student": FIRST, "critic": FIRST})
    three = {"student": FIRST, "critic": FIRST, "judge": FIRST}

    def horizon_of(method: Alternating) -> int:
        return method.bundle["judge"].schedulers["net"]._steps

    added = train(tmp_path, 7, three, rules=(("roles.judge",), ()))
    assert horizon_of(added) == count_updates("judge", 2, after=6)
    # Saved under the rule, so the rule is over, and where the role began is remembered.
    assert horizon_of(train(tmp_path, 8, three)) == count_updates("judge", 2, after=6)
    assert horizon_of(train(tmp_path / "fresh", 1, three)) == count_updates("judge", 2)
