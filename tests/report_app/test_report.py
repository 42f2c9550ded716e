"""``apps/report``: pages of runs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distill_report.cli import main
from distill_runfile.cli import EXIT_OK, EXIT_STORAGE, EXIT_USAGE


def run_folder(folder: Path, *, seed: int = 0) -> Path:
    """Make what a run that was killed early leaves."""
    folder.mkdir()
    lines = [{"iteration": i, "time": 1.0 * i, "loss/a": 1 / i} for i in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"itera')
    settings = {"training": {"seed": seed, "max_train_steps": 9}}
    (folder / "run_record.json").write_text(json.dumps({"settings": settings}))
    return folder


def test_a_killed_run_has_a_page_in_its_folder(tmp_path, capsys):
    run = run_folder(tmp_path / "run")
    assert main([str(run)]) == EXIT_OK
    page = (run / "report.html").read_text()
    assert "end not recorded" in page
    assert "iteration 3 of 9" in page
    assert str(run / "report.html") in capsys.readouterr().out


def test_runs_are_compared_in_a_file_of_its_own(tmp_path, capsys):
    runs = [run_folder(tmp_path / name, seed=n) for n, name in enumerate("ab")]
    assert main([*map(str, runs), "--to", str(tmp_path / "new" / "ab.html")]) == EXIT_OK
    page = (tmp_path / "new" / "ab.html").read_text()
    assert "2 runs compared" in page
    assert "training.seed" in page
    assert not (runs[0] / "report.html").exists()


def test_what_cannot_be_read_is_said_and_the_rest_is_shown(tmp_path, capsys):
    run = run_folder(tmp_path / "run")
    (run / "report.json").write_text("{")
    assert main([str(run)]) == EXIT_OK
    said = capsys.readouterr()
    assert "not read: report.json cannot be read" in said.err
    assert "Not everything could be read" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["."], "is no output folder of a run; name run"),
        (["run/validation"], "is no output folder of a run; name run"),
        (["run", "run"], "named twice"),
        (["run", "--to", "run/metrics.jsonl"], "must end in .html"),
    ],
)
def test_wrong_requests(tmp_path, monkeypatch, capsys, arguments, message):
    (run_folder(tmp_path / "run") / "validation").mkdir()
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert main(arguments) == EXIT_USAGE
    assert message in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_page_that_cannot_be_written_is_of_the_storage(tmp_path, capsys):
    run = run_folder(tmp_path / "run")
    (tmp_path / "file").write_text("")
    assert main([str(run), "--to", str(tmp_path / "file" / "p.html")]) == EXIT_STORAGE
