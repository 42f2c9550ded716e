"""Mutate every kind of file that is read, and report what was not answered as it should be.

    uv run tools/fuzz_files --mutations 2000
    uv run tools/fuzz_files --kinds 'weight map' tokenizer --mutations 500 --seed 7

Each mutation ends well with an error of the framework, or with the file read as its content states.
Anything else is a finding: another exception, a hang, a file taken for something else. The exit
status is 1 if there are any.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "tests")]


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="tools/fuzz_files", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--mutations", type=int, default=2000, help="over all kinds (2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds", nargs="*", default=[], help="only those with these in their names"
    )
    parser.add_argument("--number", type=int, help="one mutation by its number, with its traceback")
    args = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import torch

    from fuzz_files.fuzz import fuzz
    from fuzz_files.other_kinds import all_kinds

    torch.set_num_threads(1)
    wanted = [k for k in all_kinds() if not args.kinds or any(w in k.name for w in args.kinds)]
    share = -(-args.mutations // len(wanted))
    total = found = 0
    for kind in wanted:
        began = time.perf_counter()
        one = args.number is not None
        tally = fuzz(kind, 1 if one else share, seed=args.seed, first=args.number or 0)
        total += 1 if one else share
        found += len(tally.findings)
        print(
            f"{kind.name:<58} {tally.refused:4} refused {tally.accepted:4} taken "
            f"{len(tally.findings):3} findings {time.perf_counter() - began:6.1f} s",
            flush=True,
        )
        for finding in tally.findings:
            print(
                f"    #{finding.number} ({finding.mutation!a:.120}): {finding.outcome}", flush=True
            )
            if one:
                print(finding.details)
    print(f"{total} mutations of {len(wanted)} kinds, seed {args.seed}: {found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
