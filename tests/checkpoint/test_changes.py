"""Roles, optimizers, averages and callbacks that came or went since the checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import yaml
from checkpoint.test_resume import find_differences
from distill_checkpoint import ChangesConfig, CheckpointConfig, CheckpointManager
from distill_protocols import CheckpointError
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_run import Run, Shape, Tally, new_run

STEPS = 4


def run_with(
    folder: Path, shape: Shape, steps: int, changes: ChangesConfig, file: dict[str, Any], seed: int
) -> Run:
    run = new_run(shape, seed=seed)
    config = CheckpointConfig(resume="latest", changes=changes, keep_last=9)
    run.train(folder, steps, CheckpointManager(config, folder, file))
    return run


def resumed(
    folder: Path, shape: Shape, *, file: dict[str, Any] | None = None, steps: int = STEPS,
    **changes: tuple[str, ...],
) -> Run:  # fmt: skip
    return run_with(folder, shape, steps, ChangesConfig(**changes), file or {}, seed=1)


@pytest.fixture
def started(tmp_path):
    def start(shape: Shape, file: dict[str, Any] | None = None) -> Run:
        return run_with(tmp_path, shape, STEPS, ChangesConfig(), file or {}, seed=0)

    return start


def lines(caplog, word: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if word in r.getMessage()]


SHAPES = st.builds(
    Shape,
    ema_roles=st.sets(st.sampled_from(["student", "critic"])).map(lambda s: tuple(sorted(s))),
    extra_roles=st.sets(st.sampled_from(["reward", "a: b", "#"])).map(lambda s: tuple(sorted(s))),
    callbacks=st.sets(st.sampled_from(["tally", "report"])).map(lambda s: tuple(sorted(s))),
    told_exits=st.booleans(),
)


@example(Shape(), Shape(told_exits=True))  # an old checkpoint: the critic's weights stay
@example(Shape(told_exits=True), Shape())
@given(SHAPES, SHAPES)
def test_the_rule_suggested_by_the_error_works(then, now):
    with TemporaryDirectory() as name:
        folder = Path(name)
        first = run_with(folder, then, STEPS, ChangesConfig(), {}, seed=0)
        try:
            run = resumed(folder, now)
        except CheckpointError as error:
            text = str(error)
            rules = yaml.safe_load(text[text.index("changes:\n") :])["changes"]
            run = resumed(folder, now, **{key: tuple(value) for key, value in rules.items()})
            assert then != now
        before, after = first.everything(), run.everything()
        for kind in ("weights", "optimizers", "schedulers"):
            for key in before[kind].keys() & after[kind].keys():
                assert find_differences(before[kind][key], after[kind][key]) == []
        for key in before["callbacks"].keys() & after["callbacks"].keys():
            assert find_differences(before["callbacks"][key], after["callbacks"][key]) == []
        # What was added starts as a fresh run has it, but an average at the weights that are there.
        fresh = new_run(now, seed=1).everything()
        for key in after["weights"].keys() - before["weights"].keys():
            assert find_differences(after["weights"][key], fresh["weights"][key]) == []
            assert run.method.update_counts[key] == 0
        for key in after["ema"].keys() - before["ema"].keys():
            live = after["weights"][key]
            assert all(torch.equal(after["ema"][key][n], live[n].float()) for n in ("0.weight",))


def test_a_dropped_role_leaves_nothing_behind(started, tmp_path, caplog):
    started(Shape(extra_roles=("reward",)))
    run = resumed(tmp_path, Shape(), dropped=("roles.reward",))
    assert set(run.method.update_counts) == {
        "student.transformer", "student.transformer_2", "critic.transformer",
    }  # fmt: skip
    assert lines(caplog, "roles.reward") == [
        "resuming checkpoint-000004: roles.reward is dropped (changes): nothing of it "
        "is loaded (optimizer of transformer; weights of transformer; schedule of transformer)"
    ]
    # The next one, saved without it, fits too: the rule has nothing to do any more.
    resumed(tmp_path, Shape(), dropped=("roles.reward",), steps=STEPS + 1)
    caplog.clear()
    resumed(tmp_path, Shape(), dropped=("roles.reward",), steps=STEPS + 2)
    assert "roles.reward matches nothing" in lines(caplog, "roles.reward")[0]


def settings(lr: float) -> dict[str, Any]:
    return {"models": {"student": {"optimizer": {"lr": lr}}, "critic": {"optimizer": {"lr": 1.0}}}}


def test_an_optimizer_starts_anew_with_other_settings_once(started, tmp_path, caplog):
    before = started(Shape(), settings(0.1))
    with pytest.raises(CheckpointError, match=r"added: \[optimizers\.student\]\n *dropped: \[opt"):
        resumed(tmp_path, Shape(), file=settings(0.2))
    both = {"added": ("optimizers.student",), "dropped": ("optimizers.student",)}
    run = resumed(tmp_path, Shape(), file=settings(0.2), **both)
    optimizers = run.method.optimizer_dict
    assert not optimizers["student.transformer"].state
    assert optimizers["critic.transformer"].state
    assert run.method.update_counts["student.transformer"] == 0
    assert run.method.update_counts["critic.transformer"] == 2
    assert find_differences(run.everything()["weights"], before.everything()["weights"]) == []
    assert len(lines(caplog, "optimizers.student is dropped and added")) == 1
    # It goes on, saves, and is resumed with the same file: not a second time.
    run = resumed(tmp_path, Shape(), file=settings(0.2), **both, steps=STEPS + 2)
    assert run.method.optimizer_dict["student.transformer_2"].state
    caplog.clear()
    again = resumed(tmp_path, Shape(), file=settings(0.2), **both, steps=STEPS + 2)
    assert find_differences(again.everything(), run.everything()) == []
    assert "matches nothing" in lines(caplog, "optimizers.student")[0]
    # Yet other settings are another change.
    again = resumed(tmp_path, Shape(), file=settings(0.3), **both, steps=STEPS + 2)
    assert not again.method.optimizer_dict["student.transformer_2"].state


def test_a_role_starts_anew(started, tmp_path):
    started(Shape(ema_roles=("critic",)))
    rule = ("roles.critic",)
    run = resumed(tmp_path, Shape(ema_roles=("critic",)), added=rule, dropped=rule)
    fresh = new_run(Shape(), seed=1).everything()
    assert str(run.everything()["weights"]["critic.transformer"]) == str(
        fresh["weights"]["critic.transformer"]
    )
    assert run.method.update_counts["critic.transformer"] == 0


def test_a_rule_in_one_of_two_lists_restarts_nothing(started, tmp_path):
    before = started(Shape())
    run = resumed(tmp_path, Shape(), added=("roles.critic",))
    assert find_differences(run.everything(), before.everything()) == []


@pytest.fixture(autouse=True)
def _words(caplog):
    caplog.set_level(logging.INFO)


def test_another_scale_of_adapters_is_refused_and_the_same_is_not(started, tmp_path):
    def lora(rank: int, alpha: float | None) -> dict[str, Any]:
        return {"models": {"student": {"lora": {"rank": rank, "alpha": alpha}}}}

    first = started(Shape(), file=lora(4, None)).everything()["weights"]
    same = resumed(tmp_path, Shape(), file=lora(4, 4.0)).everything()["weights"]
    assert str(same) == str(first)
    with pytest.raises(CheckpointError, match="is 1 in the checkpoint and 4 now") as refused:
        resumed(tmp_path, Shape(), file=lora(4, 16.0))
    text = str(refused.value)
    rules = yaml.safe_load(text[text.index("changes:\n") :])["changes"]
    rules = {key: tuple(value) for key, value in rules.items()}
    anew = resumed(tmp_path, Shape(), file=lora(4, 16.0), **rules).everything()["weights"]
    assert any(str(anew[key]) != str(first[key]) for key in first if key.startswith("student"))


class Observer(Tally):
    """A callback that has state, and without which a run trains just the same."""

    only_observes = True

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() if self.stepped else {}


def observed(folder: Path, steps: int, *, by: tuple[str, ...], file: dict[str, Any]) -> Run:
    run = new_run(Shape())
    run.callbacks.update({name: Observer(name) for name in by})
    run.train(folder, steps, CheckpointManager(CheckpointConfig(keep_last=9), folder, file))
    return run


def test_what_only_observes_comes_and_goes_without_a_rule(started, tmp_path, caplog):
    started(Shape(), {"callbacks": {"tally": {}}})
    on = {"callbacks": {"tally": {}, "watch": {"every": 1, "rules": {"a": 2}}}}
    run = observed(tmp_path, STEPS + 1, by=("watch",), file=on)
    assert lines(caplog, "watch") == [
        "resuming checkpoint-000004: callbacks.watch is absent in the checkpoint and there now"
    ]
    assert [step for step, _ in run.callbacks["watch"].stepped] == [STEPS + 1]
    # Its state is resumed where both have it ...
    run = observed(tmp_path, STEPS + 2, by=("watch",), file=on)
    assert {step for step, _ in run.callbacks["watch"].stepped} == {STEPS + 1, STEPS + 2}
    # ... and its end is no change of the run, nor is its beginning, but of others it is.
    off = {"callbacks": {"tally": {}, "watch": None}}
    caplog.clear()
    run = observed(tmp_path, STEPS + 3, by=(), file=off)
    assert lines(caplog, "watch") == [
        "resuming checkpoint-000006: callbacks.watch is there in the checkpoint and absent now"
    ]
    with pytest.raises(CheckpointError, match="callback tally is in the checkpoint but not in"):
        resumed(tmp_path, Shape(callbacks=()), steps=STEPS + 4)
