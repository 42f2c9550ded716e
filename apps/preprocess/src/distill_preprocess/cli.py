"""The command line of preprocessing. torch is imported only once the file is found right."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from distill_protocols import ConfigError
from distill_runfile import cli
from distill_runfile.cli import EXIT_INTERRUPTED, EXIT_OK, EXIT_STOPPED
from distill_runtime import counted

from distill_preprocess.request import Request, read_request

_EPILOG = """\
The file has recipe (family), models (a role with the path of its model), pipeline_config and
preprocess; preprocess.run_file takes the first three from a run file, so that the data fit it.
docs/data.md shows files for folders, tables, tars and prompts.

A process that was killed goes on when it is started again: finished units stay, and the end is the
same, byte for byte. Several processes share the units, on one machine or on several:
  uv run torchrun --nproc-per-node 8 apps/preprocess --config FILE.yaml

exit status: 0 done, 1 failed, 2 the file is wrong, 74 a file could not be written or read, 75
stopped on request, 130 interrupted before anything was made.
"""


@cli.outlive_readers()
def main(argv: list[str] | None = None) -> int:
    """Run the app; returns the exit status."""
    args = _parser().parse_args(argv)
    cli.show_logs(every_rank=True)
    try:
        config = read_request(args.config)
    except ConfigError as error:
        return cli.print_problems(error, "nothing was made")
    except KeyboardInterrupt:
        print("interrupted: nothing was made", file=sys.stderr)
        return EXIT_INTERRUPTED
    return cli.run_command(
        lambda: _act(config, args),
        interrupted=lambda: _stopped(Path(config.section.output_dir)),
        status=EXIT_STOPPED,
    )


def _act(config: Request, args: argparse.Namespace) -> int:
    if args.dry_run:
        from distill_preprocess.plan import describe

        cli.say(describe(config, args.limit))
        return EXIT_OK
    if args.preview is not None:
        from distill_preprocess.preview import preview

        preview(config, args.preview, limit=args.limit)
        return EXIT_OK
    from distill_preprocess.run import run

    run(config, limit=args.limit, add=args.add, strict=args.strict)
    return EXIT_OK


def _stopped(folder: Path) -> str:
    units = len(list(folder.glob("unit-*.json")))
    are = counted(units, "finished unit is", "finished units are")
    return f"stopped: {are} in {folder}; the same command goes on"


def _parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "preprocess",
        "Make training data from videos, pictures, captions and prompts.",
        _EPILOG,
    )
    add = parser.add_argument
    add(
        "--config", type=Path, required=True, metavar="FILE.yaml", help="what becomes data, and how"
    )
    add("--limit", type=cli.positive_integer("items"), metavar="N",
        help="take the first N videos, pictures or prompts alone, for a trial")  # fmt: skip
    add("--add", action="store_true", help="add what is new in the sources to a data set")
    add("--strict", action="store_true", help="stop at the first item that cannot be used")
    add("--preview", type=cli.positive_integer("samples"), metavar="N", nargs="?", const=16,
        help="make no data, but a page and a contact sheet of N samples (16)")  # fmt: skip
    add("--dry-run", action="store_true", help="check file and sources, say what would be made")
    return parser
