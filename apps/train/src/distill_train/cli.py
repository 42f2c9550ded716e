"""The command line: ``--config run.yaml`` and little else.

torch is imported only once the file is found right: ``--help`` and a wrong file answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from distill_protocols import ConfigError, DistillError

from distill_train.process_rules import world_size_of

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_INTERRUPTED = 130
EXIT_STOPPED = 75
"""Stopped on request (SIGTERM, Ctrl-C) with everything saved: launch again to go on."""

_FIRST_SPEAKS_SECONDS = 20.0

_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?(e\d+)?)\s*(?P<unit>[kmgt]i?b|b)?", flags=re.IGNORECASE)
_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000 ** (i + 1) for i, letter in enumerate("kmgt")},
    **{f"{letter}ib": 1024 ** (i + 1) for i, letter in enumerate("kmgt")},
}

_EPILOG = """\
exit status: 0 finished, 1 failed, 2 the run file is wrong, 75 stopped on request with a
checkpoint saved (start the same command again with checkpoint.resume: latest), 130 interrupted.

several processes: uv run torchrun --nproc-per-node 8 apps/train --config RUN.yaml
(see training.distributed and docs/processes.md). Under torchrun --max-restarts a stop on request
ends with 0, as any other status would start the run again.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the app; returns the exit status."""
    args = _parser().parse_args(argv)
    if args.plugins:
        return _list_plugins()
    if args.config is None:
        _parser().error("--config RUN.yaml is needed (see configs/ for examples)")
    if not args.dry_run and (args.world_size or args.device_memory):
        _parser().error("--world-size and --device-memory go with --dry-run: they are of a plan")
    world_size = args.world_size or world_size_of(os.environ)
    try:
        from distill_train.check import read_config

        config = read_config(
            args.config, args.models_json, planning=args.dry_run, world_size=world_size
        )
    except ConfigError as error:
        _let_the_first_speak()
        count = len(error.problems)
        print(error, file=sys.stderr)
        print(f"{count} problem{'s' if count > 1 else ''}; nothing was started.", file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        print("interrupted: nothing was started", file=sys.stderr)
        return EXIT_INTERRUPTED
    try:
        if args.dry_run:
            with _collector_off():
                from distill_train.plan import describe

                print(describe(config, world_size=world_size, device_memory=args.device_memory))
            return EXIT_OK
        _show_logs()
        from distill_train.run import run

        return EXIT_OK if run(config).stop_reason is None else _stopped()
    except DistillError as error:
        print(f"{_rank_prefix()}{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted: nothing was saved since the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """Within: no garbage collection, which takes a tenth of the time of the heavy imports."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


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
        "--world-size",
        type=_count,
        metavar="N",
        help="with --dry-run: plan for so many processes (left out: those that torchrun started)",
    )
    parser.add_argument(
        "--device-memory",
        type=_bytes,
        metavar="SIZE",
        help="with --dry-run: say whether the run fits, and what would help (80GB, 24GiB, 40e9)",
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


def _rank() -> int:
    """Of this process, as torchrun numbers them."""
    return int(os.environ.get("RANK", "0"))


def _let_the_first_speak() -> None:
    """One process a machine says what is wrong with the file (on another machine it may be another
    file), and by its end all others end: torchrun sees to that. They must not end before it, or
    they would take it along, unheard; one whose first process finds nothing speaks in the end."""
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        time.sleep(_FIRST_SPEAKS_SECONDS)


def _rank_prefix() -> str:
    return f"rank {_rank()}: " if world_size_of(os.environ) > 1 else ""


def _stopped() -> int:
    """The status of a run that was asked to stop: torchrun starts processes again that end with
    any but 0, as often as its --max-restarts allows."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return EXIT_OK if restarts > 0 else EXIT_STOPPED


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of processes, from 1")
    return int(text)


def _bytes(text: str) -> int:
    found = _SIZE.fullmatch(text.strip())
    size = float(found["number"]) * _UNITS[(found["unit"] or "").lower()] if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a size in bytes, such as 80GB (10^9), 24GiB (2^30) or 40e9"
        )
    return int(size)


def _show_logs() -> None:
    """What our own packages have to say goes to the terminal, of ranks but the first only if it
    warns; other libraries' only if grave. Before torch is imported."""
    # Its C++ side warns past Python, once a process: of DDP that looks for weights which a step
    # leaves out, though none was; of a store that is gone with its process, with C++ frames.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    prefix = _rank_prefix() if _rank() else ""
    logging.basicConfig(level=logging.WARNING, format=f"{prefix}%(message)s", stream=sys.stdout)
    if _rank():
        return
    for name in ("checkpoint", "conditioning", "evaluation", "methods", "train", "trainer"):
        logging.getLogger(f"distill_{name}").setLevel(logging.INFO)


def _list_plugins() -> int:
    from distill_runtime import load_plugin, plugin_names

    for group in ("distill.families", "distill.methods", "distill.callbacks"):
        print(group)
        for name in plugin_names(group):
            print(f"  {name:<14} {load_plugin(group, name).help}")
    return EXIT_OK
