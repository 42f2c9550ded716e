"""The health callback in small runs: that it only looks, when it speaks, and what it does then."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from attrs import evolve
from checkpoint.test_resume import find_differences
from distill_checkpoint import CheckpointConfig, list_checkpoints
from distill_evaluation.health.config import CollapseRule, HealthConfig, LossesRule
from distill_evaluation.health.plugin import health
from distill_evaluation.health.turns import Turns
from distill_protocols import DiscriminatorSpec, PlannedRun, RoleSpec
from health_runs import PROMPTS, At, ToyRun, captions, watched_numbers
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_on_ranks

EVERY_STEP = HealthConfig(every_steps=1, prompts=PROMPTS)
BURNING = 0.3
"""A rate of thirty times the toy networks' own, at which clips leave what the teacher makes."""


def test_a_run_is_bitwise_what_it_is_without_health(tmp_path):
    runs = [
        ToyRun(tmp_path / name, health=health).train()
        for name, health in (("with", EVERY_STEP), ("without", None))
    ]
    first, second = (run.weights() for run in runs)
    assert all(torch.equal(first[key], second[key]) for key in second)
    states = [run.method.streams.state_dict() for run in runs]
    assert find_differences(*states) == []
    modes = [[m.training for m in run.method.model_dict.values()] for run in runs]
    assert modes[0] == modes[1]
    assert "health/variety" in runs[0].tracker.scalars[0][1]
    assert runs[0].tracker.scalars[0][1].keys() >= {"health/teacher/motion", "health/teacher/flow"}
    assert "health/data/latent_std" in runs[0].tracker.scalars[0][1]
    logged = runs[0].tracker.scalars[-1][1]
    for part in ("student.transformer/dmd_loss", "critic.transformer/critic_loss"):
        role = part.partition("/")[0]
        assert logged[f"loss_grad_norm/{part}"] == pytest.approx(logged[f"grad_norm/{role}"])


@pytest.mark.parametrize("role", ["critic", "teacher"])
def test_another_role_may_be_watched(tmp_path, role):
    run = ToyRun(tmp_path, steps=4, health=evolve(EVERY_STEP, role=role)).train()
    variety = [values["health/variety"] for _, values in run.tracker.scalars]
    assert len(variety) > 1
    assert (max(variety) - min(variety) < 1e-9) == (role == "teacher"), "it does not move"


def test_a_role_that_makes_no_clips_is_refused():
    heads = RoleSpec(
        name="judge", path="", trainable=True, heads=DiscriminatorSpec(on="critic", blocks=(0,))
    )
    run = PlannedRun(roles={"judge": heads})
    [problem] = health.problems(evolve(EVERY_STEP, role="judge"), run)
    assert "'judge' is a discriminator" in problem.message


@given(st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=12), st.integers(1, 5),
       st.integers(0, 11))  # fmt: skip
def test_every_turn_since_the_last_check_is_measured_once(schedule, interval, resumed):
    method = Scheduled(schedule)
    turns, resumed = Turns(), resumed % len(schedule)
    whole = [turns.is_new(method, n, interval) for n in range(1, len(schedule) + 1)]
    for first in range(0, len(schedule), interval):
        part = slice(first, first + interval)
        measured = [turn for turn, new in zip(schedule[part], whole[part], strict=True) if new]
        assert sorted(measured) == sorted(set(schedule[part]))
    again = Turns()
    rest = [again.is_new(method, n, interval) for n in range(resumed + 1, len(schedule) + 1)]
    assert rest == whole[resumed:]


class Scheduled:
    """Stands for a method: a letter for each module that steps, by iteration."""

    def __init__(self, schedule: Any) -> None:
        self._schedule = schedule

    def get_optimizers(self, iteration: int) -> Any:
        return dict.fromkeys(self._schedule[iteration - 1])


def test_an_alarm_is_said_once_and_everywhere(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    run = ToyRun(tmp_path, lr=BURNING, health=EVERY_STEP).train()
    alarms = run.alarms
    assert "collapse" in {alarm["rule"] for alarm in alarms}
    names = [(alarm["rule"], alarm["subject"]) for alarm in alarms]
    (collapse,) = [alarm for alarm in alarms if alarm["rule"] == "collapse"]
    assert collapse.keys() >= {
        "iteration", "rule", "action", "message", "value", "threshold", "reference",
    }  # fmt: skip
    assert collapse["action"] == "warn"
    assert [r.getMessage() for r in caplog.records if r.name.startswith("distill_evaluation")] == [
        f"health, iteration {a['iteration']}, {a['rule']}: {a['message']}" for a in alarms
    ]
    assert run.tracker.texts == [
        (a["iteration"], f"health/{a['rule']}", a["message"]) for a in alarms
    ]
    assert len(set(names)) == len(names), "said again, although it had not cleared"
    assert run.result.stop_reason is None
    assert run.tracker.scalars[-1][1]["health/alarms"] >= 1


def test_a_healthy_toy_run_is_silent(tmp_path):
    # Captions alone: the toy teacher's clips are not of the toy data.
    run = ToyRun(tmp_path, health=EVERY_STEP, examples=captions).train()
    assert run.alarms == []
    assert not (tmp_path / "health.jsonl").exists()


@pytest.mark.parametrize("stop_after", [2, 5])
def test_a_resumed_run_raises_the_same_alarms(tmp_path, stop_after):
    config = HealthConfig(every_steps=2, prompts=PROMPTS)
    whole = ToyRun(tmp_path / "whole", lr=BURNING, health=config).train()
    folder = tmp_path / "parts"
    # The first process comes two iterations further than what it saved, as a killed one may.
    saving = CheckpointConfig(every_steps=stop_after, keep_last=9)
    for at in (stop_after + 2, None):
        others = [] if at is None else [At(at, _kill)]
        run = ToyRun(folder, lr=BURNING, health=config, checkpoint=saving, others=others)
        if at is None:
            run.train()
        else:
            with pytest.raises(KilledError):
                run.train()
    assert run.result.resumed_from == stop_after
    assert run.alarms == whole.alarms
    assert run.alarms != []
    assert whole.health is not None
    assert run.health is not None
    first, second = (r.health.state_dict() for r in (whole, run))
    assert find_differences(first, second) == []


def test_a_check_that_a_stop_interrupts_is_made_up_for(tmp_path):
    config = HealthConfig(every_steps=2, prompts=PROMPTS)
    whole = ToyRun(tmp_path / "whole", lr=BURNING, health=config).train()
    folder, saving = tmp_path / "parts", CheckpointConfig()
    # Asked for before health's own hook, which polls.
    stop = At(6, lambda run: run.request_stop("preempted"))
    run = ToyRun(folder, lr=BURNING, health=config, checkpoint=saving, first=[stop]).train()
    assert run.result.iteration == 6
    assert run.health is not None
    assert run.health.state_dict()["due"] == 6
    run = ToyRun(folder, lr=BURNING, health=config, checkpoint=saving).train()
    assert run.result.resumed_from == 6
    assert run.alarms == whole.alarms
    assert find_differences(whole.health.state_dict(), run.health.state_dict()) == []


class KilledError(Exception):
    """Stands for a process that is killed."""


def _kill(run: Any) -> None:
    raise KilledError


def test_a_run_that_had_no_health_is_watched_from_where_it_goes_on(tmp_path):
    saving = CheckpointConfig(every_steps=4, keep_last=9)
    ToyRun(tmp_path, steps=4, checkpoint=saving).train()
    run = ToyRun(tmp_path, steps=8, health=EVERY_STEP, checkpoint=saving).train()
    assert run.result.resumed_from == 4
    assert run.health is not None
    series: Any = run.health.state_dict()["history"]
    assert [iteration for iteration, _ in series["series"]["variety"]] == [5, 6, 7, 8]
    assert ToyRun(tmp_path, steps=9, checkpoint=saving).train().result.resumed_from == 8


def test_keep_holds_the_checkpoint_of_before_the_first_sign(tmp_path):
    burn = At(6, lambda run: _set_rate(run, 10.0))
    rule = LossesRule(action="keep", rise=3.0)
    config = HealthConfig(
        every_steps=2, prompts=PROMPTS, losses=rule, collapse=CollapseRule(action="off")
    )
    saving = CheckpointConfig(every_steps=2, keep_last=1)
    run = ToyRun(tmp_path, steps=16, health=config, checkpoint=saving, others=[burn]).train()
    alarm = next(a for a in run.alarms if a["rule"] == "losses")
    assert alarm["action"] == "keep"
    healthy = alarm["iteration"] - 2 * config.patience
    # That of before the alarm, of before one that may be coming, and the newest.
    assert sorted(list_checkpoints(tmp_path)) == [healthy, 14, 16]
    # A run that goes on asks for the first one again.
    ToyRun(tmp_path, steps=18, health=config, checkpoint=saving).train()
    assert sorted(list_checkpoints(tmp_path)) == [healthy, 16, 18]


def test_stop_ends_the_run_with_a_checkpoint_and_says_why(tmp_path):
    config = HealthConfig(every_steps=1, prompts=PROMPTS, collapse=CollapseRule(action="stop"))
    run = ToyRun(tmp_path, lr=BURNING, health=config, checkpoint=CheckpointConfig()).train()
    assert run.result.iteration < 12
    assert str(run.result.stop_reason).startswith("health: ")
    assert list(list_checkpoints(tmp_path)) == [run.result.iteration]


def _set_rate(run: Any, rate: float) -> None:
    for optimizer in run.method.optimizer_dict.values():
        for group in optimizer.param_groups:
            group["lr"] = rate


def test_without_a_data_set_the_training_alone_is_watched(tmp_path):
    run = ToyRun(tmp_path, lr=BURNING, health=EVERY_STEP, examples=None).train()
    assert run.health is not None
    state: Any = run.health.state_dict()
    assert "critic_loss" in state["history"]["series"]
    assert "variety" not in state["history"]["series"]


def test_checks_are_rarer_where_they_would_cost_more_than_their_share(tmp_path):
    # 12 iterations of 4 samples are 144 calls. Before the first, 6 clips of the teacher take 16
    # each, and these and the data's are looked at, 36 calls each: 168. A check takes 48.
    for share, iterations in ((0.3, [12]), (1.9, [6, 12]), (5.3, list(range(1, 13)))):
        config = HealthConfig(share=share, prompts=PROMPTS)
        run = ToyRun(tmp_path / str(share), health=config).train()
        assert run.health is not None
        state: Any = run.health.state_dict()
        assert [i for i, _ in state["history"]["series"]["variety"]] == iterations


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_know_the_numbers_of_one_process_and_the_first_alone_speaks(tmp_path, size):
    alone = watched_numbers(tmp_path / "alone", EVERY_STEP)
    first, *others = run_on_ranks(watched_numbers, tmp_path / "ranks", EVERY_STEP, size=size)
    for rank in others:
        assert rank["history"] == first["history"]
        assert rank["texts"] == []
    references, expected = first["history"]["references"], alone["history"]["references"]
    assert references.keys() == expected.keys() == {"teacher", "data"}
    for owner, numbers in expected.items():
        assert references[owner] == pytest.approx(numbers, rel=1e-5, abs=1e-6)
    for name, points in alone["history"]["series"].items():
        if name == "student_std":
            continue  # the method's own, of the rows of a rank
        own = first["history"]["series"][name]
        assert [i for i, _ in own] == [i for i, _ in points]
        # Weights differ by the order of fp32 sums.
        assert [v for _, v in own] == pytest.approx([v for _, v in points], rel=1e-3, abs=1e-5)
