"""Check on one accelerator what no test on a CPU can tell, with random weights of Wan 1.3B's size.

    uv run tools/gpu_check                        # all of it, on one device, in about 8 minutes
    uv run tools/gpu_check --only attention compile
    uv run tools/gpu_check --cpu                  # every check at tiny size: whether they still run

Each check is a process of its own and gives rows: what was measured, what it should be, whether it
is. They go to ``gpu_check.json`` and ``gpu_check.md`` in ``--output``. What a CPU cannot measure is
a row without a verdict. The exit status is 1 where a row missed its aim or a check broke.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from attrs import asdict

from gpu_check.checks import CHECKS, Row
from gpu_check.runs import FULL, TINY, Size, prepare


def main() -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="tools/gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=sorted(CHECKS), help="these checks alone")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, at tiny size")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu_check"))
    parser.add_argument("--one", choices=sorted(CHECKS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here. --cpu runs every check at tiny size")
    size = TINY if args.cpu else FULL
    if args.one is not None:
        rows = CHECKS[args.one](args.folder, size)
        (args.folder / f"{args.one}.json").write_text(json.dumps([asdict(row) for row in rows]))
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, size)
        rows = [row for check in args.only or CHECKS for row in run_check(check, folder, args.cpu)]
    write_results(args.output, rows, size)
    return 1 if any(row.good is False for row in rows) else 0


def run_check(name: str, folder: Path, cpu: bool) -> list[Row]:
    """Run one check in a process of its own; one that breaks is a row, too."""
    command = [sys.executable, str(Path(__file__).parent), "--one", name, "--folder", str(folder)]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})
    began = time.perf_counter()
    done = subprocess.run(
        [*command, *(["--cpu"] if cpu else [])], env=environment, capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    result = folder / f"{name}.json"
    if done.returncode == 0 and result.exists():
        rows = [Row(**values) for values in json.loads(result.read_text())]
    else:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(done.stderr[-4000:], file=sys.stderr)
        rows = [Row(f"{name}: broke", last, f"exit status 0, not {done.returncode}", good=False)]
    for row in rows:
        print(row.line(), flush=True)
    print(f"{name}: {seconds:.0f} s", flush=True)
    return rows


def write_results(output: Path, rows: list[Row], size: Size) -> None:
    """Write the rows as JSON and as a Markdown table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    head = {"device": device, "torch": torch.__version__, "size": size.name}
    text = json.dumps({**head, "rows": [asdict(row) for row in rows]}, indent=1)
    (output / "gpu_check.json").write_text(text + "\n")
    lines = [
        f"{device}, torch {torch.__version__}, {size.describe()}",
        "",
        "| check | measured | aim | |",
        "|---|---|---|---|",
        *(row.table_row() for row in rows),
    ]
    (output / "gpu_check.md").write_text("\n".join(lines) + "\n")
    print(f"{output / 'gpu_check.md'}: {sum(row.good is False for row in rows)} missed")


if __name__ == "__main__":
    sys.exit(main())
