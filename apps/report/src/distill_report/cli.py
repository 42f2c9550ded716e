"""The command line. Needs no torch: a page is made on any machine that has the files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from distill_evaluation.page import is_run_folder, read_run
from distill_protocols import ConfigError
from distill_runfile import cli
from distill_runfile.cli import EXIT_OK
from distill_runtime import counted, readable_bytes

_EPILOG = """\
OUTPUT is a run's output folder, of a run that is finished, under way, stopped or damaged: the page
shows what is there, and says what cannot be read. The file needs nothing beside it and loads
nothing, so it can be mailed.

  uv run apps/report outputs/mine                        # outputs/mine/report.html
  uv run apps/report outputs/a outputs/b --to ab.html    # curves, clips and settings of both

exit status: 0 written, 2 the request is wrong, 74 the file could not be written, 130 interrupted.
"""
PAGE = "report.html"
COMPARISON = "comparison.html"
_SUFFIXES = (".html", ".htm")
_MOST_SHOWN = 8
_MOST_RUNS = 32


@cli.outlive_readers()
def main(argv: list[str] | None = None) -> int:
    """Run the app; returns the exit status."""
    args = _parser().parse_args(argv)
    problems = list(_problems(args.outputs, args.to))
    if problems:
        return cli.print_problems(ConfigError(problems), "nothing was written")

    def write() -> int:
        from distill_evaluation.page import write_page

        info = write_page([read_run(folder) for folder in args.outputs], _target(args))
        for problem in info.problems:
            cli.say(f"not read: {problem}", sys.stderr)
        left_out = f", {info.left_out} left out" if info.left_out else ""
        cli.say(
            f"{info.path}: {readable_bytes(info.size)}, {counted(info.clips, 'clip')}{left_out}; "
            "open it in a browser"
        )
        return EXIT_OK

    return cli.run_command(write, interrupted=lambda: "interrupted: nothing was written")


def _parser() -> argparse.ArgumentParser:
    parser = cli.new_parser("report", "Make the page of a run, or compare runs.", _EPILOG)
    parser.add_argument(
        "outputs", type=Path, nargs="+", metavar="OUTPUT", help="a run's output folder"
    )
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FILE",
        help=f"default: {PAGE} in the run's output folder; of several runs, {COMPARISON} here",
    )
    return parser


def _target(args: argparse.Namespace) -> Path:
    default = args.outputs[0] / PAGE if len(args.outputs) == 1 else Path(COMPARISON)
    return args.to or default


def _problems(outputs: Sequence[Path], to: Path | None) -> Iterator[str]:
    if len(outputs) > _MOST_RUNS:
        yield f"{len(outputs)} runs: at most {_MOST_RUNS} can be told apart on one page"
    seen: set[Path] = set()
    for folder in outputs:
        if folder.resolve() in seen:
            yield f"{folder} is named twice; a run is compared with others"
        seen.add(folder.resolve())
        if not folder.is_dir():
            yield f"{folder}: no such folder; name the output folder of a run"
        elif not is_run_folder(folder):
            yield f"{folder} is no output folder of a run{_runs_below(folder)}"
    if to is not None and to.suffix.lower() not in _SUFFIXES:
        # Or a slip of the hand would replace a file of the run.
        yield f"--to: {to} must end in .html, as it is a page"


def _runs_below(folder: Path) -> str:
    try:
        below = sorted(path for path in folder.iterdir() if path.is_dir() and is_run_folder(path))
    except OSError:
        return ""
    if is_run_folder(folder.parent):
        below = [folder.parent]
    if not below:
        return "; nothing in it was written by one"
    more = ", ..." if len(below) > _MOST_SHOWN else ""
    return f"; name {', '.join(map(str, below[:_MOST_SHOWN]))}{more}"
