"""Reports during a run, on the shipped tiny Wan and its judge: their numbers, and that they only
look."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from distill_evaluation.plugins import report as plugin
from distill_evaluation.report import ReportCallback
from distill_protocols import Callback, ConfigError, RunState
from distill_runfile.read import read_config
from distill_runfile.schema import RunConfig
from distill_train.build import Run, build
from tiny_run import one_process

JUDGE = Path(__file__).resolve().parents[2] / "configs" / "tiny" / "judge"
ENTRIES = {
    "teacher_2": {"role": "teacher", "sampler": {"steps": 2, "shift": 3.0, "guidance": 1.5}},
    "student_2": {"role": "student", "ema": True},  # its sampler draws noise
    "student_2_live": {"role": "student", "during": False},
}
NUMBERS = {
    "fd", "digit", "direction", "variance", "motion", "flow", "sharpness", "contrast", "saturation",
    "clipped",
}  # fmt: skip


class Watcher:
    """In the checkpointer's place: the metrics as it sees them after each step."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, Any]] = {}

    def resume(self, run: RunState, callbacks: Mapping[str, Callback]) -> int:
        return 0

    def after_step(self, run: RunState, callbacks: Mapping[str, Callback]) -> None:
        report = {name: v for name, v in run.metrics.items() if name.startswith("report/")}
        if report:
            self.seen[run.iteration] = report

    def finish(self, run: RunState, callbacks: Mapping[str, Callback]) -> None: ...


@pytest.fixture
def checked(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., RunConfig]:
    """Check a run file of 4 iterations with a report that stands before ``ema``."""

    def make(**changes: Any) -> RunConfig:
        path = tiny(
            "dmd2",
            training={"max_train_steps": 4, "log_every": 1, "trackers": ["jsonl"]},
            method_config={"generator_update_interval": 2},
            callbacks={"report": None, "ema": None},
            checkpoint={"export": []},
            validation=None,
        )
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("the digit three moving up\nthe digit seven moving left\n")
        values = yaml.safe_load(path.read_text())
        values["callbacks"] |= {
            "report": {
                "judge": str(JUDGE),
                "prompts": str(prompts),
                "clips_per_prompt": 2,
                "sheet_prompts": ["the digit two moving right"],
                "entries": ENTRIES,
                **changes,
            },
            "ema": {"roles": ["student"], "decay": 0.5},
        }
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return read_config(path)

    return make


def trained(config: RunConfig) -> tuple[Run, Watcher]:
    torch.manual_seed(0)
    run = build(config, distribution=one_process())
    watcher = Watcher()
    run.trainer.checkpointer = watcher
    run.trainer.run(run.method, run.loader)
    return run, watcher


def everything(run: Run) -> dict[str, Any]:
    by_module = run.bundle.by_module
    return {
        "weights": {key: m.state_dict() for key, m in by_module("modules").items()},
        "optimizers": {key: o.state_dict() for key, o in by_module("optimizers").items()},
        "ema": {key: e.state_dict() for key, e in by_module("ema").items()},
        "streams": run.method.streams.state_dict(),
        "loader": run.loader.state_dict(),
        "global": torch.get_rng_state(),
        "modes": [p.training for m in run.method.model_dict.values() for p in m.modules()],
        "learns": [p.requires_grad for m in run.method.model_dict.values() for p in m.parameters()],
    }


def assert_same(a: Any, b: Any, path: str = "") -> None:
    if isinstance(a, Mapping):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def test_reports_during_a_run_do_not_change_it(checked, tmp_path):
    plain, nothing = trained(checked())
    before = everything(plain)
    assert nothing.seen == {}

    config = checked(every_steps=1)
    looked_at, watcher = trained(config)
    assert_same(before, everything(looked_at))

    # The checkpointer gets the metrics that the plugin names, and so does the report at the end.
    announced = plugin.metrics(config.callbacks["report"])
    assert set(announced) == {
        f"report/{entry}/{number}" for entry in ("teacher_2", "student_2") for number in NUMBERS
    }
    assert set(announced.values()) == {1}
    assert list(watcher.seen) == [1, 2, 3, 4]
    assert all(seen.keys() == announced.keys() for seen in watcher.seen.values())
    rows = {row["name"]: row for row in json.loads(report_file(tmp_path))["entries"]}
    for entry in ("teacher_2", "student_2"):
        row = rows[entry]
        end = {"fd": row["frechet_distance"], "variance": row["within_caption_variance"]}
        for number, value in (end | row["accuracy"]).items():
            assert watcher.seen[4][f"report/{entry}/{number}"] == value
    assert rows["student_2"]["frechet_distance"] != rows["student_2_live"]["frechet_distance"]
    # The student learns in iterations 2 and 4.
    fd = [seen["report/student_2/fd"] for seen in watcher.seen.values()]
    assert fd[1] == fd[2]
    assert len({fd[0], fd[1], fd[3]}) == 3
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["report/student_2/fd"] for line in lines if "report/student_2/fd" in line] == fd


def report_file(tmp_path: Path) -> str:
    return (tmp_path / "out" / "report.json").read_text()


def test_only_due_iterations_and_weights_that_move_are_measured(checked, monkeypatch):
    measured: list[str] = []
    measure = ReportCallback._measure

    def counted(self: ReportCallback, run: RunState, name: str, entry: Any) -> Any:
        measured.append(name)
        return measure(self, run, name, entry)

    monkeypatch.setattr(ReportCallback, "_measure", counted)
    _, watcher = trained(checked(every_steps=2))
    assert list(watcher.seen) == [2, 4]
    assert measured == ["teacher_2", "student_2", "student_2", "student_2", "student_2_live"]


def test_a_report_that_a_stop_ends_adds_nothing(checked, monkeypatch):
    measured: list[str] = []
    stops: list[RunState] = []
    config = checked(every_steps=1)
    measure = ReportCallback._measure

    def stopping(self: ReportCallback, run: RunState, name: str, entry: Any) -> Any:
        measured.append(name)
        stops[-1].request_stop("received SIGTERM")
        return measure(self, run, name, entry)

    start = ReportCallback.on_train_start
    monkeypatch.setattr(ReportCallback, "_measure", stopping)
    monkeypatch.setattr(
        ReportCallback, "on_train_start", lambda self, run: (stops.append(run), start(self, run))
    )
    _, watcher = trained(config)
    assert measured == ["teacher_2"]
    assert not watcher.seen


def test_measuring_nothing_is_a_problem_of_the_file(checked):
    entries = {name: {**entry, "during": False} for name, entry in ENTRIES.items()}
    with pytest.raises(ConfigError, match=r"report.every_steps: 5, but every entry states during"):
        checked(every_steps=5, entries=entries)
    checked(entries=entries)
    with pytest.raises(ConfigError, match=r"report.every_steps: -1 must be at least 0"):
        checked(every_steps=-1)


def test_metrics_of_a_report_whose_judge_cannot_be_read_are_left_to_problems(checked, tmp_path):
    from attrs import evolve

    config = checked(every_steps=3).callbacks["report"]
    assert plugin.metrics(config)
    (tmp_path / "judge").mkdir()
    for text in (None, "no json", "[]", "{}"):
        if text is not None:
            (tmp_path / "judge" / "judge.json").write_text(text)
        assert plugin.metrics(evolve(config, judge=str(tmp_path / "judge"))) == {}
