"""The app under torchrun: two processes, one of which is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import state

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30
EVERY = 10


def torchrun(config: Path, log: Path, *options: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options]
    with log.open("wb") as out:
        return subprocess.Popen(
            [*command, str(ROOT / "apps" / "train"), "--config", str(config)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def worker_pid(parent: int, rank: int) -> int:
    """Return the process id of a rank that torchrun started."""
    for children in Path(f"/proc/{parent}/task").glob("*/children"):
        for child in children.read_text().split():
            if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
                return int(child)
    raise AssertionError(f"torchrun has no rank {rank}")


@pytest.mark.slow
def test_a_killed_worker_is_restarted_and_resumes_from_latest(tiny, tmp_path):
    """What is lost is done again, and nothing else: one line of metrics an iteration."""
    out = tmp_path / "out"
    config = tiny(
        "dmd2",
        training={"max_train_steps": STEPS, "log_every": 1, "distributed": {"strategy": "fsdp2"}},
        checkpoint={"every_steps": EVERY, "keep_last": None},
        validation=None,
        callbacks={"report": None},
    )
    log = tmp_path / "log"
    run = torchrun(config, log, "--max-restarts", "1")
    try:
        while not (out / f"checkpoint-{EVERY:06}").exists():
            assert run.poll() is None, log.read_text()
            time.sleep(0.05)
        survivor, victim = (worker_pid(run.pid, rank) for rank in (0, 1))
        # Or torchrun may end the survivor before it has printed its error.
        os.kill(run.pid, signal.SIGSTOP)
        os.kill(victim, signal.SIGKILL)
        while state(survivor) not in "ZX":
            time.sleep(0.05)
        first_log = log.read_text()
        os.kill(run.pid, signal.SIGCONT)
        status = run.wait()
    finally:
        run.kill()
    assert re.search(
        r"rank 0 waited for the others at iteration \d+.* lost them .*rank 1 ", first_log
    )
    second_log = log.read_text()
    assert status == 0, second_log
    assert "resumed" in second_log
    assert f"finished after iteration {STEPS}" in second_log
    assert "Warning" not in second_log, "torch's own, once a process"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["iteration"] for line in rows if "loss/total_loss" in line]
    assert losses == list(range(1, STEPS + 1))
    assert (out / "student" / "model_index.json").exists()
