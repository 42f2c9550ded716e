"""The command line: statuses, what it prints, and what it does without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import EntryPoint

import distill_runfile.cli
import distill_runtime.plugins
import pytest
from distill_adapters_wan import PLUGIN
from distill_runfile.cli import EXIT_INCOMPLETE, EXIT_OK
from distill_train.cli import main


def test_status_2_no_traceback_nothing_written_and_no_torch(values, write, tmp_path):
    values["method_config"]["generator_update_intervl"] = 5
    path = write(values)
    code = (
        "import sys\nfrom distill_train.cli import main\n"
        f"status = main(['--config', {str(path)!r}])\n"
        "assert 'torch' not in sys.modules\nassert 'numpy' not in sys.modules\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "1 problem; nothing was started." in done.stderr
    assert not (tmp_path / "out").exists()


def test_help_and_a_missing_config(capsys):
    with pytest.raises(SystemExit) as excinfo:
        main(["--help"])
    assert excinfo.value.code == 0
    assert "--dry-run" in capsys.readouterr().out
    with pytest.raises(SystemExit) as excinfo:
        main([])
    assert excinfo.value.code == 2
    assert "--config RUN.yaml is needed" in capsys.readouterr().err


def test_a_reader_that_is_gone_changes_nothing():
    """As `apps/train --dry-run | head -1`: no message, and the status that it has anyway."""
    reading, writing = os.pipe()
    os.close(reading)
    code = "import sys; from distill_train.cli import main; sys.exit(main(['--plugins']))"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_plugins_are_listed(capsys):
    assert main(["--plugins"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("wan", "dmd2", "finetune", "teacher_only", "ema", "report"))


def test_one_process_a_machine_says_what_is_wrong(values, write):
    """The other processes print nothing and wait: torchrun ends all once one has ended."""
    values["training"]["seed"] = -1
    command = [sys.executable, "-c", "from distill_train.cli import main; main()"]
    first, second = (
        subprocess.Popen(
            [*command, "--config", str(write(values))],
            env=os.environ | {"LOCAL_RANK": local_rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for local_rank in "01"
    )
    assert "training.seed" in first.communicate()[1]
    assert second.poll() is None
    second.terminate()
    assert second.communicate()[1] == ""


def test_a_process_that_alone_has_problems_prints_them_at_last(values, write, monkeypatch, capsys):
    monkeypatch.setattr(distill_runfile.cli, "FIRST_RANK_SECONDS", 0.0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    values["training"]["seed"] = -1
    assert main(["--config", str(write(values))]) == 2
    assert "training.seed" in capsys.readouterr().err


def test_the_plan_states_the_source_of_the_negative_condition(
    values, write, capsys, tmp_path, monkeypatch
):
    # Memory of model calls, which takes seconds, is not what is asked for here.
    monkeypatch.setattr(type(PLUGIN), "plan_call", lambda *_, **__: None)

    def plan(status: int = EXIT_OK) -> str:
        assert main(["--config", str(write(values)), "--dry-run"]) == status
        return capsys.readouterr().out

    assert "in the data set's constants (prompt '')" in plan()
    values["conditioning"] = {"negative_prompt": "blurred"}
    assert "encoded once at set-up from 'blurred'" in plan()
    del values["conditioning"]
    values["data"]["path"] = str(tmp_path / "to_come")
    text = plan(EXIT_INCOMPLETE)
    assert text.splitlines()[-1] == f"a run still needs the data set {tmp_path / 'to_come'}"
    assert "needed; the data set must bring it" in text
    assert "not on this machine yet" in text
    views = {"student": {"role": "student"}}
    held_out = {"data": {"path": str(tmp_path / "held_out")}, "views": views, "prompts": ["a"]}
    values["validation"] = held_out
    assert (
        plan(EXIT_INCOMPLETE)
        .splitlines()[-1]
        .endswith(f"the held-out data set {tmp_path / 'held_out'}")
    )
    del values["validation"]
    values["method_config"]["real_score_guidance_scale"] = 1.0
    assert "none, and no step needs one" in plan(EXIT_INCOMPLETE)


def test_the_plan_counts(values, write, capsys):
    assert main(["--config", str(write(values)), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    memory = lines[lines.index(next(x for x in lines if x.startswith("memory"))) + 2 :][:2]
    # 1,087,136 parameters and 16,384 of buffers: fp32 weights, gradients, two moments, an average.
    assert memory[0].split()[:9] == ["student", "4.4", "MB", "4.3", "MB", "8.7", "MB", "4.3", "MB"]
    assert memory[1].split()[:6] == ["teacher", "4.4", "MB", "-", "-", "-"]
    updates = next(line for line in lines if line.strip().startswith("student (lr"))
    assert updates.split(")")[1].split() == [*"...x...x..", "1"]


SILENT = """
from distill_protocols import CONTRACT_VERSION, FamilyPlugin
class Silent(FamilyPlugin):
    contract = CONTRACT_VERSION
Silent.__abstractmethods__ = frozenset()
PLUGIN = Silent()
"""


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_package", "No module named 'no_such_package'"),
        ("import sys; sys.exit('no licence')", "no licence"),
        ("raise ValueError('two\\nlines')", "two"),
        ("PLUGIN = 3", "is a int, not an instance of FamilyPlugin"),
        (SILENT, "has no attribute 'help'"),
    ],
)
def test_a_broken_plugin_is_named_and_the_others_are_listed(
    capsys, monkeypatch, tmp_path, source, reason
):
    (tmp_path / "foreign_plugin.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "foreign_plugin", raising=False)
    real = distill_runtime.plugins.entry_points

    def with_broken(*, group: str):
        broken = EntryPoint("broken", "foreign_plugin:PLUGIN", group)
        return (broken, *real(group=group)) if group == "distill.families" else real(group=group)

    monkeypatch.setattr(distill_runtime.plugins, "entry_points", with_broken)
    assert main(["--plugins"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (broken,) = [line for line in lines if line.startswith("  broken ")]
    assert reason in broken
    assert any(line.startswith("  wan ") for line in lines)
    assert any(line.startswith("  dmd2 ") for line in lines)
    assert "distill.trackers" in lines


def test_logs_of_all_packages_are_shown_without_a_list_of_names():
    names = distill_runfile.cli.framework_packages()
    for package in ("adapters_wan", "checkpoint", "conditioning", "train", "trajectories"):
        assert f"distill_{package}" in names
