"""What things cost, each as a ratio of two times of one run, with its spread.

    uv run tools/bench                             # all of them, in about 10 minutes
    uv run tools/bench --only trainer guidance
    uv run tools/bench --save ratios.json          # for a later --against
    uv run tools/bench --against tools/bench/baseline.json

A ratio holds on another machine as far as one can hope for, and a busy one slows both sides alike;
seconds do not. ``--against`` names what got slower by more than its spread, and then the exit
status is 1. The other files of this folder measure one thing each, in more detail.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402

from bench.figures import HEAD, Figure, find_slower, load, save  # noqa: E402
from bench.ratios import RATIOS  # noqa: E402


def main() -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="tools/bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=sorted(RATIOS), help="these alone")
    parser.add_argument("--repeats", type=int, default=10, help="of each pair (default 10)")
    parser.add_argument("--save", type=Path, help="write the ratios to this file")
    parser.add_argument("--against", type=Path, help="compare with a file of --save")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error(f"--repeats {args.repeats}: at least 2, or there is no spread")
    before = load(args.against) if args.against else {}
    torch.set_num_threads(1)
    figures: list[Figure] = []
    print(HEAD)
    for name in args.only or RATIOS:
        with tempfile.TemporaryDirectory() as folder:
            for figure in RATIOS[name](Path(folder), args.repeats):
                print(figure.line(), flush=True)
                figures.append(figure)
    if args.save:
        save(figures, args.save, f"{platform.machine()}, torch {torch.__version__}")
    slower = find_slower(figures, before)
    if args.against:
        print("\n".join(slower) or f"nothing is slower than in {args.against} by its spread")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
