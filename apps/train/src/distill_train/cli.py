"""The command line: ``--config run.yaml`` and little else.

torch is imported only once the file is found right: ``--help`` and a wrong file answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from distill_protocols.errors import ConfigError, DistillError

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_INTERRUPTED = 130
EXIT_STOPPED = 75
"""Stopped on request (SIGTERM, Ctrl-C) with everything saved: launch again to go on."""

_EPILOG = """\
exit status: 0 finished, 1 failed, 2 the run file is wrong, 75 stopped on request with a
checkpoint saved (start the same command again with checkpoint.resume: latest), 130 interrupted.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the app; returns the exit status."""
    args = _parser().parse_args(argv)
    if args.plugins:
        return _list_plugins()
    if args.config is None:
        _parser().error("--config RUN.yaml is needed (see configs/ for examples)")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        print(
            f"{os.environ['WORLD_SIZE']} processes were started, but this release trains in one: "
            "each would be a run of its own in the same folder. Start it without torchrun.",
            file=sys.stderr,
        )
        return EXIT_FAILED
    try:
        from distill_train.check import read_config

        config = read_config(args.config, args.models_json, planning=args.dry_run)
    except ConfigError as error:
        count = len(error.faults)
        print(error, file=sys.stderr)
        print(f"{count} fault{'s' if count > 1 else ''}; nothing was started.", file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        print("interrupted: nothing was started", file=sys.stderr)
        return EXIT_INTERRUPTED
    try:
        if args.dry_run:
            from distill_train.plan import describe

            print(describe(config))
            return EXIT_OK
        _show_logs()
        from distill_train.run import run

        return EXIT_OK if run(config).stop_reason is None else EXIT_STOPPED
    except DistillError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted: nothing was saved since the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="apps/train",
        description="Distil or finetune a video diffusion model, as one YAML file says.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="RUN.yaml", help="the run file")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the file, print the plan (roles, memory, updates, data), start nothing",
    )
    parser.add_argument(
        "--models_json",
        type=Path,
        metavar="MODELS.json",
        help="role -> keys, laid over the file's models: section (for generated runs)",
    )
    parser.add_argument(
        "--plugins", action="store_true", help="list the installed families, methods, callbacks"
    )
    return parser


def _show_logs() -> None:
    """What our own packages have to say goes to the terminal; other libraries' only if grave."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    for name in ("checkpoint", "conditioning", "evaluation", "methods", "train", "trainer"):
        logging.getLogger(f"distill_{name}").setLevel(logging.INFO)


def _list_plugins() -> int:
    from distill_protocols.plugins import load_plugin, plugin_names

    for group in ("distill.families", "distill.methods", "distill.callbacks"):
        print(group)
        for name in plugin_names(group):
            print(f"  {name:<14} {load_plugin(group, name).help}")
    return EXIT_OK
