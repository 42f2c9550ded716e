"""Draw run files at random, run what the check accepts, and compare with stopped runs.

    uv run python tools/random_runs.py --count 200 --seed 0     # an hour on two quiet cores
    uv run python tools/random_runs.py --only 137               # one case again, its files kept

Each case is a tiny run file: method x kind of Wan x precision x LoRA x base x checkpointing x
compile x offload x attention kernel x causal options x accumulation x workers x dropout x EMA x
validation x exports x asynchronous saves. ``tests/random_runs.py`` states what must hold of it.
Exit status 1 where an accepted file did not run to its end, or a run that was stopped and started
again left other files.
"""

from __future__ import annotations

import argparse
import collections
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="number of cases (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="the first case's; the others follow")
    parser.add_argument("--only", type=int, help="run this case alone, and keep its folder")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from random_runs import Folders, draw, try_file

    torch.set_num_threads(1)
    seeds = range(args.seed, args.seed + args.count) if args.only is None else [args.only]
    counts: collections.Counter[str] = collections.Counter()
    root = Path(tempfile.mkdtemp(prefix="random-runs-"))
    (root / "shared").mkdir()
    folders = Folders(root / "shared")
    for seed in seeds:
        began = time.monotonic()
        values = draw(seed, folders)
        try:
            outcome = try_file(seed, folders, root / str(seed))
        except Exception:
            counts["failed"] += 1
            result = f"FAILED\n{traceback.format_exc(limit=-4)}"
        else:
            kind = "refused" if outcome.problems else "ran"
            kind = "DIFFERS" if outcome.differences else kind
            counts[kind] += 1
            result = f"{kind} {'; '.join(outcome.problems or outcome.differences)[:300]}"
        what = f"{values['recipe']['method']}, {time.monotonic() - began:.0f} s"
        print(f"{seed} ({what}): {result}", flush=True)
        if args.only is None:
            shutil.rmtree(root / str(seed), ignore_errors=True)
    print(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    if args.only is None:
        shutil.rmtree(root)
    else:
        print(f"kept: {root}")
    return int(bool(counts["failed"] or counts["DIFFERS"]))


if __name__ == "__main__":
    raise SystemExit(main())
