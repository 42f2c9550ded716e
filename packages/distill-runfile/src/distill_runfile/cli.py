"""What the command lines of all apps share: parsers, exit status, problems, logs.

torch is imported by an app only once its file is found right: ``--help`` and a wrong file answer
at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TextIO, cast

from distill_protocols import (
    CheckpointError,
    ConfigError,
    DistillError,
    OutputError,
    StorageError,
)
from distill_runtime import printable

from distill_runfile.pipes import outlive_readers as outlive_readers

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
"""The file or the request is wrong; nothing was started."""
EXIT_INCOMPLETE = 3
"""A plan of a file that is right, for a run that needs what is not on this machine yet."""
EXIT_STORAGE = 74
"""A file could not be written or read while a run was under way: a full disk, a folder that is
gone. What was saved before is whole: the same command goes on."""
EXIT_STOPPED = 75
"""Stopped on request (SIGTERM, Ctrl-C) with everything saved: the same command goes on."""
EXIT_INTERRUPTED = 130

PAUSE = 0.1
"""Seconds after which a run has finished deleting a checkpoint."""
FIRST_RANK_SECONDS = 20.0
"""For how long the other processes of a machine wait for the first one to say what is wrong."""


def new_parser(app: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Make the parser of ``apps/<app>``; line breaks of ``epilog`` stay."""
    return argparse.ArgumentParser(
        prog=f"apps/{app}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def hold_newest_checkpoint(path: Path, argument: str) -> tuple[Path, IO[bytes]]:
    """Choose the checkpoint of ``path``, and keep its run from deleting it until the file closes.

    Args:
        path: a checkpoint, or a run's output folder, whose newest one is taken.
        argument: what named it, for messages.

    Raises:
        CheckpointError: there is none.
    """
    from distill_checkpoint import (
        find_newest_checkpoint,
        hold_checkpoint,
        is_checkpoint_folder,
        list_checkpoints,
    )

    if is_checkpoint_folder(path):
        held = hold_checkpoint(path)
        if held is not None:
            return path, held
        raise CheckpointError(
            f"{argument}: {path} has just been deleted, as its run keeps only the newest. Name "
            "the output folder, whose newest checkpoint is taken then."
        )
    former: Path | None = None
    while (newest := find_newest_checkpoint(path)) is not None:
        held = hold_checkpoint(newest)
        if held is not None:
            say(f"taking {newest}")
            return newest, held
        if newest == former:  # nobody is deleting it
            raise CheckpointError(
                f"{argument}: {newest} is damaged, as it has no manifest.json, and an older one is "
                "not taken in silence. Name the checkpoint that you want, or delete this one."
            )
        say(f"{newest} has been deleted since; taking the next")
        former = newest
        time.sleep(PAUSE)
    inside = ", ".join(folder.name for folder in list_checkpoints(path).values())
    raise CheckpointError(
        f"{argument}: {path} is no checkpoint (which has a manifest.json) and no output "
        f"folder of a run that holds one (it holds: {inside or 'none'}). Name a folder such as "
        "outputs/mine/checkpoint-000400."
    )


def positive_integer(unit: str) -> Callable[[str], int]:
    """Make the type of an argument that counts ``unit``, from 1."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of {unit}, from 1")
        return int(text)

    return parse


def run_command(
    action: Callable[[], int],
    *,
    interrupted: Callable[[], str],
    status: int = EXIT_INTERRUPTED,
) -> int:
    """Do ``action``, and turn what ends it into a line on stderr and an exit status.

    Args:
        interrupted: what to say after SIGTERM or Ctrl-C.
        status: the exit status then; for EXIT_STOPPED the line goes to stdout.
    """
    try:
        return action()
    except DistillError as error:
        say(f"{rank_prefix()}{type(error).__name__}: {error}", sys.stderr)
        return EXIT_STORAGE if _is_of_storage(error) else EXIT_FAILED
    except OSError as error:
        say(f"{rank_prefix()}{type(error).__name__}: {error}", sys.stderr)
        return EXIT_STORAGE
    except KeyboardInterrupt:
        stream = sys.stdout if status == EXIT_STOPPED else sys.stderr
        print(interrupted(), file=stream)
        return status


def _is_of_storage(error: DistillError) -> bool:
    """Return whether ``error`` came of a disk."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    return isinstance(error, StorageError) or (
        isinstance(error, OutputError | CheckpointError) and cause is not None
    )


def print_needs(needs: Sequence[str]) -> int:
    """Print what a run still needs, as the last line of a plan; returns the status."""
    if not needs:
        return EXIT_OK
    say(f"\na run still needs {'; '.join(needs)}")
    return EXIT_INCOMPLETE


def say(text: object, stream: TextIO | None = None) -> None:
    """Print what may hold text from files: a terminal shows it, and obeys nothing of it.

    Args:
        stream: None: stdout. What its encoding does not have is escaped too.
    """
    target = cast(TextIO, stream or sys.stdout)
    encoding = target.encoding or "utf-8"
    fit = printable(str(text)).encode(encoding, "backslashreplace").decode(encoding)
    print(fit, file=target)


def print_problems(error: ConfigError, outcome: str) -> int:
    """Print every problem of a file, how many they are, and ``outcome``; returns the status."""
    let_the_first_rank_speak()
    count = len(error.problems)
    say(error, sys.stderr)
    print(f"{count} problem{'s' if count > 1 else ''}; {outcome}.", file=sys.stderr)
    return EXIT_USAGE


def let_the_first_rank_speak() -> None:
    """Wait, on all processes of a machine but the first.

    One process a machine reports the problems of the file (on another machine it may be another
    file), and by its end all others end: torchrun sees to that. They must not end before it, or
    they would take it along, unheard; one whose first process finds nothing speaks in the end.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        time.sleep(FIRST_RANK_SECONDS)


def rank_prefix() -> str:
    """Say which process speaks, where there are several."""
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    return f"rank {_rank()}: " if several else ""


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def show_logs(*, every_rank: bool = False) -> None:
    """Print what the packages of the framework log; of other libraries, warnings alone.

    To be called before torch is imported.

    Args:
        every_rank: show the log of every rank; of all but the first warnings alone.
    """
    # Its C++ side warns past Python, once a process: of DDP that looks for weights which a step
    # leaves out, though none was; of a store that is gone with its process, with C++ frames.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    prefix = rank_prefix() if _rank() else ""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_PrintableFormatter(f"{prefix}%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    if every_rank or _rank() == 0:
        for name in framework_packages():
            logging.getLogger(name).setLevel(logging.INFO)


class _PrintableFormatter(logging.Formatter):
    """Messages quote what stands in files."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def framework_packages() -> set[str]:
    """Find the import names of our own packages and apps, and of all that offer plugins."""
    # Here, as ``--help`` is answered without them.
    from distill_runtime import GROUPS
    from distill_runtime.plugins import entry_points

    ours = {
        path.name
        for folder in map(Path, sys.path)
        if folder.is_dir()
        for path in folder.glob("distill_*")
        if path.is_dir() and not path.name.endswith((".dist-info", ".egg-info"))
    }
    offered = {
        entry.module.partition(".")[0] for group in GROUPS for entry in entry_points(group=group)
    }
    return ours | offered


def list_plugins() -> int:
    """Print all installed plugins; of one that is broken, why. Returns the exit status."""
    from distill_protocols import CallbackPlugin, PluginError
    from distill_runtime import GROUPS, load_plugin, plugin_names

    for group in GROUPS:
        print(group)
        names = plugin_names(group)
        for name in names:
            try:
                plugin = load_plugin(group, name)
                text = plugin.help
                if isinstance(plugin, CallbackPlugin) and plugin.on_by_default:
                    text += " (on by default)"
            # Whatever a foreign package does when it is looked at: the others are listed too.
            except (PluginError, AttributeError) as error:
                text = f"broken: {error}"
            say(f"  {name:<14} {text}")
        if not names:
            print("  none")
    return EXIT_OK
