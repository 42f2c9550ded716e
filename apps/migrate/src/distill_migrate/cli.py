"""The command line of the migration."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from distill_protocols import FamilyPlugin, PluginError
from distill_runfile import cli
from distill_runfile.cli import EXIT_OK, EXIT_USAGE
from distill_runtime import load_plugin

_EPILOG = """\
what is read:
  FastVideo, legacy   checkpoint-<n>/ with distributed_checkpoint/, *_weight_only/, ema folders
  FastVideo, newer    checkpoint-<n>/ with metadata.json and dcp/
  Self-Forcing        ode_init.pt and other files that hold {"generator": ...}
  ComfyUI             one .safetensors file of a transformer (init_from reads it as it is, too)
No file is unpickled: what is more than tensors and plain values is refused.

The result holds weights (and averages), not optimizers: start roles from it with
models.<role>.init_from, or write them out with apps/export --config RUN.yaml.

exit status: 0 written, 1 failed, 2 the request is wrong, 74 the disk failed, 130
interrupted.
"""


@cli.outlive_readers()
def main(argv: list[str] | None = None) -> int:
    """Run the app; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        family: FamilyPlugin[Any] = load_plugin("distill.families", args.family)
    except PluginError as error:
        cli.say(f"--family: {error}", sys.stderr)
        return EXIT_USAGE
    if not args.source.exists():
        cli.say(f"--from: there is nothing at {args.source}", sys.stderr)
        return EXIT_USAGE
    return cli.run_command(
        lambda: _migrate(args, family), interrupted=lambda: "interrupted: nothing was written"
    )


def _migrate(args: argparse.Namespace, family: FamilyPlugin[Any]) -> int:
    from distill_checkpoint import migrate
    from distill_runtime import sigterm_as_interrupt

    with sigterm_as_interrupt():
        facts = migrate(args.source, args.to, names=family.foreign_names(), ema=not args.no_ema)
    cli.say(f"{args.source} is {facts.layout}, iteration {facts.iteration:,}")
    for line in facts.taken:
        cli.say(f"  taken  {line}")
    for line in facts.left:
        cli.say(f"  left   {line}")
    # Absolute: a run file's paths are relative to itself, and begin with ./ or ../.
    start = f"init_from: {{path: {args.to.resolve()}}}"
    cli.say(f"written to {args.to}; start a role from it with\n  {start}")
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "migrate",
        "Turn a checkpoint of FastVideo or Self-Forcing into one of this framework.",
        _EPILOG,
    )
    add = parser.add_argument
    add("--from", dest="source", type=Path, required=True, metavar="PATH",
        help="the checkpoint's folder, or a .pt file")  # fmt: skip
    add("--to", type=Path, required=True, metavar="FOLDER", help="the new checkpoint's folder")
    add("--family", default="wan", help="whose weights they are (default wan)")
    add("--no-ema", action="store_true", help="leave averages out")
    return parser
