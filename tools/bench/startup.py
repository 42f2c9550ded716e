"""How long the app takes to answer: ``--help`` and a wrong run file, whole processes.

    uv run python tools/bench/startup.py [--runs 11]

Wall seconds from outside, median and spread, next to a bare ``python -c pass`` of the same
interpreter in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
APP = [sys.executable, str(ROOT / "apps" / "train")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=11)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        wrong = Path(folder) / "wrong.yaml"
        text = (ROOT / "configs" / "tiny" / "dmd2.yaml").read_text()
        wrong.write_text(text.replace("generator_update_interval", "generator_update_intervl"))
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "--help": [*APP, "--help"],
            "wrong config": [*APP, "--config", str(wrong)],
        }
        times = {name: [] for name in commands}
        for _ in range(runs + 1):
            # In turns, so that a slow moment of the machine falls on all alike.
            for name, command in commands.items():
                times[name].append(seconds(command))
    for name, values in times.items():
        counted = sorted(values[1:])
        print(
            f"{name:<16} median {statistics.median(counted):.3f} s   "
            f"min {counted[0]:.3f}   max {counted[-1]:.3f}   ({runs} runs)"
        )


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
