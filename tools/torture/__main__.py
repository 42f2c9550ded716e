"""Kill the apps again and again, or fill their disk, and see that nothing is lost.

    uv run tools/torture                                   # everything
    uv run tools/torture --modes self_forcing two_ranks --seed 3

Modes: ``shipped`` and ``shipped_async`` (the tiny DMD2 run), ``self_forcing`` (LoRA roles beside
one base, saves in the background, the best kept, two workers), ``two_ranks`` (sharded, a rank is
killed in a step, a save or a validation), ``trajectories``, ``export`` and ``full_disk`` (for
root, who may mount a small one).

After each kill every checkpoint folder must be whole, byte for byte against its manifest. The same
command is then given again, which goes on. In the end everything must equal what an uninterrupted
run leaves: weights, averages, optimizers, generators, data position, counters; but for the first
two modes metrics, validation, report and exports too.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torture import run_files
from torture.full_disk import FullDisk
from torture.kills import Kills, RunFile
from torture.other_apps import AppKills
from torture.processes import prepare
from torture.two_ranks import RankKills

KILLS = {
    "shipped": 60, "shipped_async": 60, "self_forcing": 60, "two_ranks": 20, "trajectories": 10,
    "export": 10, "full_disk": 1,
}  # fmt: skip
"""How often in each mode; of ``full_disk`` how often at each moment."""


def main() -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="tools/torture", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--modes", nargs="*", choices=list(KILLS), default=list(KILLS))
    parser.add_argument("--kills", type=int, help="in each mode (default: 60, 20, 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--steps", type=int, default=60, help="iterations of a run of one process")
    parser.add_argument("--lora", action="store_true", help="shipped: student and critic as LoRAs")
    args = parser.parse_args()
    prepare()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for mode in args.modes:
        kills = KILLS[mode] if args.kills is None else args.kills
        with tempfile.TemporaryDirectory() as folder:
            _modes(args, Path(folder))[mode](kills)
    return 0


def _modes(args: argparse.Namespace, folder: Path) -> dict[str, Callable[[int], None]]:
    def shipped(out: Path, *, async_save: bool) -> dict[str, object]:
        values = run_files.shipped(out, args.steps, lora=args.lora)
        values["checkpoint"]["async_save"] = async_save
        return values

    def kills(title: str, run_file: RunFile, *, all_files: bool) -> Callable[[int], None]:
        made = Kills(folder, run_file, steps=args.steps, seed=args.seed, all_files=all_files)
        return lambda count: made.run(count, title)

    in_background = functools.partial(shipped, async_save=True)
    self_forcing = functools.partial(run_files.self_forcing, steps=args.steps)
    return {
        "shipped": kills("shipped", functools.partial(shipped, async_save=False), all_files=False),
        "shipped_async": kills("shipped, in the background", in_background, all_files=False),
        "self_forcing": kills("self_forcing", self_forcing, all_files=True),
        "two_ranks": RankKills(folder, steps=12, seed=args.seed).run,
        "trajectories": AppKills(folder, seed=args.seed).trajectories,
        "export": AppKills(folder, seed=args.seed).exports,
        "full_disk": FullDisk(folder, seed=args.seed).run,
    }


if __name__ == "__main__":
    raise SystemExit(main())
