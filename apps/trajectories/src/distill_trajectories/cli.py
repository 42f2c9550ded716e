"""The command line of the trajectories. torch is imported only once the file is found right."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from attrs import evolve
from distill_protocols import ConfigError
from distill_runfile import SampledConfig, cli
from distill_runfile.cli import EXIT_INTERRUPTED, EXIT_OK, EXIT_STOPPED
from distill_runtime import counted

from distill_trajectories.config import TrajectoriesConfig
from distill_trajectories.request import read_request

_EPILOG = """\
The file has recipe (family), models (one role, the teacher), data (whose captions), conditioning,
pipeline_config and trajectories; configs/tiny/trajectories.yaml is one. Method kd trains on what
is made (docs/methods/kd.md).

A process that was killed goes on when it is started again: whole shards stay, and the end is the
same, byte for byte. Several processes share the shards, on one machine or on several:
  uv run torchrun --nproc-per-node 8 apps/trajectories --config FILE.yaml

exit status: 0 done, 1 failed, 2 the file is wrong, 3 with --dry-run: it is right, but what it needs
is not here yet (the last line states what), 74 a file could not be written or read, 75 stopped on
request, 130 interrupted before anything was made.
"""


@cli.outlive_readers()
def main(argv: list[str] | None = None) -> int:
    """Run the app; returns the exit status."""
    args = _parser().parse_args(argv)
    cli.show_logs(every_rank=True)
    try:
        config = read_request(args.config, planning=args.dry_run)
    except ConfigError as error:
        return cli.print_problems(error, "nothing was made")
    except KeyboardInterrupt:
        print("interrupted: nothing was made", file=sys.stderr)
        return EXIT_INTERRUPTED
    if args.limit is not None:
        config = evolve(config, section=evolve(config.section, limit=args.limit))
    return cli.run_command(
        lambda: _plan(config) if args.dry_run else _sample(config),
        interrupted=lambda: _stopped(Path(config.section.output_dir)),
        status=EXIT_STOPPED,
    )


def _plan(config: SampledConfig[TrajectoriesConfig]) -> int:
    from distill_trajectories.plan import describe

    cli.say(describe(config))
    return cli.print_needs(config.missing)


def _sample(config: SampledConfig[TrajectoriesConfig]) -> int:
    from distill_trajectories.run import run

    run(config)
    return EXIT_OK


def _stopped(folder: Path) -> str:
    shards = len(list(folder.glob("shard-*.safetensors")))
    are = counted(shards, "whole shard is", "whole shards are")
    return f"stopped: {are} in {folder}; the same command goes on"


def _parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "trajectories",
        "Sample a teacher and store its trajectories from noise to clip, to train a student on.",
        _EPILOG,
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="FILE.yaml", help="what to sample, and how")
    add("--limit", type=cli.positive_integer("clips"), metavar="N",
        help="stop after N clips, whatever the file has; more later extend it")  # fmt: skip
    add("--dry-run", action="store_true", help="check the file, say what would be made")
    return parser
