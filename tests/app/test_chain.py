"""The tiny causal chain by one command: planned, run, killed in a stage, resumed, finished."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from distill_methods import CausalConsistencyMethod
from distill_protocols import ConfigError
from distill_runfile import find_chain, read_source
from distill_runfile.cli import EXIT_FAILED, EXIT_INCOMPLETE, EXIT_OK, EXIT_USAGE
from distill_train.chain import read_last_losses
from distill_train.cli import main

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny"
STAGES = ("finetune_causal", "causal_consistency", "chain_self_forcing")
STEPS = {"finetune_causal": 1, "causal_consistency": 2, "chain_self_forcing": 4}


def write_chain(root: Path) -> Path:
    """Copy the shipped files of the chain, with few iterations and no report; return the second."""
    folder = root / "configs" / "tiny"
    folder.mkdir(parents=True)
    for shared in ("wan", "data"):
        (folder / shared).symlink_to(TINY / shared)
    for name in STAGES:
        values: Any = read_source(TINY / f"{name}.yaml").values
        values["training"] |= {
            "max_train_steps": STEPS[name], "global_batch_size": 2, "progress": False,
            "trackers": ["jsonl"], "log_every": 1,
        }  # fmt: skip
        values["checkpoint"] |= {"every_steps": 1, "keep_last": 1}
        values["callbacks"] = {"ema": values["callbacks"]["ema"], "health": None, "page": None}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return folder / f"{STAGES[1]}.yaml"


def chain(file: Path, *options: str) -> int:
    return main(["--chain", "--config", str(file), *options])


def weights(root: Path) -> bytes:
    (file,) = root.glob("outputs/tiny-causal-consistency/student/transformer/*.safetensors")
    return file.read_bytes()


def run_until_killed(file: Path, iteration: int) -> None:
    """Run the chain until the second stage is in ``iteration``, and end the process there."""
    step = CausalConsistencyMethod.single_train_step

    def step_or_die(self: CausalConsistencyMethod, batch: Any, now: int) -> Any:
        if now == iteration:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch, now)

    CausalConsistencyMethod.single_train_step = step_or_die  # type: ignore[method-assign]
    chain(file)


def test_a_killed_chain_goes_on_by_the_same_command(tmp_path, capsys):
    whole, parts = write_chain(tmp_path / "whole"), write_chain(tmp_path / "parts")
    assert chain(whole) == EXIT_OK
    assert "the chain is finished: 2 stages" in capsys.readouterr().out
    assert chain(whole) == EXIT_OK
    out = capsys.readouterr().out
    assert out.count("finished already") == 2
    assert "the chain is finished" in out

    child = multiprocessing.get_context("fork").Process(target=run_until_killed, args=(parts, 2))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not list(tmp_path.glob("parts/outputs/tiny-causal-consistency/student"))
    assert chain(parts) == EXIT_OK
    assert capsys.readouterr().out.count("finished already") == 1
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")

    # A result that is damaged, or newer than what was made of it, is no start.
    start = tmp_path / "whole/outputs/tiny-finetune-causal/student/transformer"
    (file,) = start.glob("*.safetensors")
    os.utime(file)
    assert chain(whole) == EXIT_FAILED
    assert "was made anew since" in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:-8])
    assert chain(whole) == EXIT_USAGE, "found before the first run starts"
    assert "was cut short" in capsys.readouterr().err


def test_the_files_before_a_file_are_found_by_its_starts(tmp_path, capsys):
    last = write_chain(tmp_path).with_stem(STAGES[-1])
    assert [stage.file.stem for stage in find_chain(last)] == list(STAGES)
    first = find_chain(last.with_stem(STAGES[0]))
    assert [(s.file.stem, dict(s.starts)) for s in first] == [(STAGES[0], {})]
    assert chain(last, "--dry-run") == EXIT_OK, "what an earlier stage makes is not missing"
    plan = capsys.readouterr().out
    assert all(f"stage {n} of 3: " in plan for n in (1, 2, 3))
    # A wrong file is found before the first run starts.
    text = last.read_text()
    last.write_text(text.replace("score_shift: 2.0", "score_shift: -2.0"))
    assert chain(last) == EXIT_USAGE
    assert "chain_self_forcing.yaml" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()
    # Without the first file its result must be there.
    last.write_text(text)
    last.with_stem(STAGES[0]).unlink()
    assert chain(last, "--dry-run") == EXIT_INCOMPLETE
    assert "tiny-finetune-causal/student" in capsys.readouterr().out
    assert chain(last) == EXIT_USAGE
    assert "tiny-finetune-causal/student is not there" in capsys.readouterr().err
    # In a circle nobody is the first.
    second = last.with_stem(STAGES[1])
    second.write_text(
        second.read_text().replace(
            "tiny-finetune-causal/student", "tiny-chain-self-forcing/student"
        )
    )
    with pytest.raises(ConfigError, match="each waits for the other's result"):
        find_chain(last)


@pytest.mark.parametrize(
    "damage", [b'{"loss/total_loss": 1', b"\xff\n", b'[1]\n{"lr": 2.0}', b"1" * 9999]
)
def test_losses_of_a_stage_are_those_of_the_last_whole_line(tmp_path, damage):
    file = tmp_path / "metrics.jsonl"
    assert read_last_losses(file) == {}
    file.write_bytes(b'{"loss/total_loss": 3.0}\n{"loss/total_loss": 2.5, "lr": 1.0}\n' + damage)
    assert read_last_losses(file) == {"total_loss": 2.5}
