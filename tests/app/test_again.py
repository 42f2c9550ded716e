"""A finished run that is started again touches nothing, unless results are asked for anew."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from attrs import evolve
from distill_runfile import read_config
from distill_runfile.cli import EXIT_FAILED, EXIT_OK
from distill_train.cli import main
from distill_train.closing import describe_end
from distill_trainer import TrainResult
from run_files import tiny_run


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Run file of a run that is done, with a validation and an export."""
    folder = tmp_path_factory.mktemp("finished")
    values = tiny_run(folder / "out")
    values["training"] |= {"max_train_steps": 2, "global_batch_size": 2, "progress": False}
    values["method_config"]["generator_update_interval"] = 2
    values["validation"] = {
        "prompts": ["the digit one moving up"], "views": {"student": {"role": "student"}},
    }  # fmt: skip
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    assert main(["--config", str(file)]) == EXIT_OK
    return file


def test_a_finished_run_prints_so_and_changes_nothing(finished, capsys):
    before = contents(finished.parent)
    assert main(["--config", str(finished)]) == EXIT_OK
    assert capsys.readouterr().out.startswith(
        f"finished already: {finished.parent / 'out'} holds iteration 2 of 2, and nothing was"
    )
    assert contents(finished.parent) == before


def test_a_run_leaves_a_record_of_itself_and_says_what_comes_next(finished):
    out = finished.parent / "out"
    record = json.loads((out / "run_record.json").read_text())
    assert record["run_file"] == {"name": "run.yaml", "text": finished.read_text()}
    assert record["settings"]["training"]["max_train_steps"] == 2
    assert record["environment"]["packages"]["torch"] == torch.__version__
    [start] = record["starts"]
    assert (start["iteration"], start["stop_reason"]) == (2, None)
    assert start["ended"] >= start["time"]

    config = read_config(finished, None, planning=False, world_size=None)
    assert (out / "report.html").read_text().count("</section>") == 7, "on by default"
    result = TrainResult(iteration=2, stop_reason=None, updates={"student.transformer": 1})
    lines = describe_end(config, result, 75.0).splitlines()
    assert lines[0].startswith("finished after iteration 2 of 2 in 1.2 minutes; updates: student.")
    named = {line.strip().rsplit("  ", 1)[1] for line in lines[1:] if line.startswith("  student")}
    assert named == {str(out / "student")}
    assert any(str(out / "checkpoint-000002") in line for line in lines)
    command = next(line for line in lines if "apps/sample" in line)
    assert shlex.split(command)[-3:] == [str(out), "--prompt", "the digit one moving up"]
    stopped = evolve(result, iteration=1, stop_reason="SIGTERM")
    assert describe_end(config, stopped, 3.0).endswith("to go on: the same command again")


def test_each_result_is_rebuilt_alone_on_request(finished, capsys):
    out = finished.parent / "out"
    before = contents(out)
    shutil.rmtree(out / "student")
    shutil.rmtree(out / "validation")
    assert main(["--config", str(finished), "--again", "export"]) == EXIT_OK
    after = contents(out)
    assert not (out / "validation").exists()
    exported = [name for name in before if name.startswith("student/")]
    assert exported
    assert all(after[name][1] == before[name][1] for name in exported)
    logs = [name for name in before if name.startswith(("tensorboard", "metrics", "checkpoint-"))]
    assert all(after[name] == before[name] for name in logs), "nothing else is written"
    assert json.loads((out / "run.json").read_text())["finished"] == 2
    with pytest.raises(SystemExit):
        main(["--config", str(finished), "--again", "report"])
    assert "this run has no such result (it has: export, validation" in capsys.readouterr().err


def test_results_of_a_longer_run_are_not_rebuilt(finished, tmp_path, capsys):
    shutil.copytree(finished.parent / "out", tmp_path / "out")
    values = yaml.safe_load(finished.read_text())
    values["training"] |= {"output_dir": str(tmp_path / "out"), "max_train_steps": 4}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    before = contents(tmp_path / "out")
    assert main(["--config", str(file), "--again", "export"]) == EXIT_FAILED
    assert "no checkpoint of iteration 4, the run's last" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
