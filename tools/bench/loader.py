"""Which share of a tiny step the run waits for its data.

    uv run python tools/bench/loader.py [--steps 40] [--methods finetune dmd2 kd_causal]

kd's files read ``outputs/tiny-trajectories``, which configs/tiny/trajectories.yaml makes.
Runs of the shipped tiny files, cut short, each without workers and with one: the sum of
``time/data`` over the sum of ``time/iteration`` of ``metrics.jsonl``, without the first iterations.
Both are of the same iterations of one run, so a busy box slows them alike.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from distill_runfile.read import read_config  # noqa: E402
from distill_train.run import run  # noqa: E402
from tiny_file import tiny_values, write_changed  # noqa: E402

WARM_UP = 5


TRAJECTORIES = {"kd", "kd_causal"}


def wait_share(folder: Path, method: str, steps: int, workers: int) -> tuple[float, float, float]:
    """Return the share, and the median milliseconds waited for data and of an iteration."""
    output_dir = folder / f"{method}-{workers}"
    changes = {
        "training": {
            "output_dir": str(output_dir), "max_train_steps": steps, "log_every": 1,
            "progress": False, "trackers": ["jsonl"], "optimizer": {"schedule": None},
        },
        "data": {"workers": workers}, "validation": None,
        "checkpoint": {"export": None, "every_steps": None, "keep_best": None},
    }  # fmt: skip
    values = tiny_values(method) | {"callbacks": {"step_timer": {}}}
    if method in TRAJECTORIES:
        values["data"] = {"path": str(ROOT / "outputs/tiny-trajectories")}
    file = write_changed(folder / f"{output_dir.name}.yaml", values, changes)
    run(read_config(file))
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines][WARM_UP:]
    waited, whole = ([row[f"time/{name}"] for row in rows] for name in ("data", "iteration"))
    middle = len(rows) // 2
    return sum(waited) / sum(whole), 1e3 * sorted(waited)[middle], 1e3 * sorted(whole)[middle]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--methods", nargs="+", default=["finetune", "dmd2", "self_forcing"])
    args = parser.parse_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        for method in args.methods:
            for workers in (0, 1):
                share, waited, whole = wait_share(Path(folder), method, args.steps, workers)
                print(
                    f"{method:<14} workers {workers}: {share:.2%} of a step "
                    f"({waited:.2f} of {whole:.0f} ms)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
