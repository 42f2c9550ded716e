"""The command line of the trajectories. torch is imported only once the file is found right."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from attrs import evolve
from distill_protocols import ConfigError, DistillError

from distill_trajectories.check import read_request

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_STOPPED = 75
"""Stopped on request (SIGTERM, Ctrl-C); whole shards are kept: start again to go on."""

_EPILOG = """\
The file has recipe (family), models (one role, the teacher), data (whose captions), conditioning,
pipeline_config and trajectories; configs/tiny/trajectories.yaml is one. Method kd trains on what
is made (docs/methods/kd.md).

A process that was killed goes on when it is started again: whole shards stay, and the end is the
same, byte for byte. Several processes share the shards, on one machine or on several:
  uv run torchrun --nproc-per-node 8 apps/trajectories --config FILE.yaml

exit status: 0 done, 1 failed, 2 the file is wrong, 75 stopped on request.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the app; returns the exit status."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    for name in ("conditioning", "train", "trajectories"):
        logging.getLogger(f"distill_{name}").setLevel(logging.INFO)
    try:
        config = read_request(args.config, planning=args.dry_run)
    except ConfigError as error:
        count = len(error.problems)
        print(error, file=sys.stderr)
        print(f"{count} problem{'s' if count > 1 else ''}; nothing was made.", file=sys.stderr)
        return EXIT_CONFIG
    if args.limit is not None:
        config = evolve(config, section=evolve(config.section, limit=args.limit))
    try:
        if args.dry_run:
            from distill_trajectories.plan import describe

            print(describe(config))
            return EXIT_OK
        from distill_trajectories.run import run

        run(config)
    except DistillError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        folder = Path(config.section.output_dir)
        shards = len(list(folder.glob("shard-*.safetensors")))
        print(f"stopped: {shards} whole shard(s) are in {folder}; the same command goes on")
        return EXIT_STOPPED
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="apps/trajectories",
        description="Sample a teacher and store what its clips were on the way, to learn from.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="FILE.yaml", help="what to sample, and how")
    add("--limit", type=_count, metavar="N",
        help="stop after N clips, whatever the file says; more later extend it")  # fmt: skip
    add("--dry-run", action="store_true", help="check the file, say what would be made")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of clips, from 1")
    return int(text)
