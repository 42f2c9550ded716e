"""Mutations of one kind of file, each tried in a copy of its folder."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from attrs import field, frozen
from distill_protocols import DistillError

from fuzz_files.kinds import Kind, SilentDifferenceError
from fuzz_files.mutations import Mutation

SECONDS = 60
"""For one mutation; a busy machine takes ten for the slowest."""


@frozen(kw_only=True)
class Finding:
    """A mutation that was not answered as it should be."""

    kind: str
    number: int
    mutation: str
    outcome: str
    details: str = field(default="", repr=False)


@frozen(kw_only=True)
class Tally:
    """What became of the mutations of one kind."""

    kind: str
    refused: int
    accepted: int
    findings: tuple[Finding, ...]


class HangError(BaseException):
    """A mutation took too long; no ``except Exception`` hides it."""


def fuzz(kind: Kind, count: int, *, seed: int = 0, first: int = 0) -> Tally:
    """Try ``count`` mutations of ``kind``: the same for the same seed.

    A file that is refused before it is mutated is the only finding then.
    """
    refused = accepted = 0
    findings: list[Finding] = []
    with _silence(), tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        folder = Path(scratch) / "copy"
        shutil.copytree(kind.template(), folder)
        try:
            kind.sign(folder)
            kind.use(folder)
        except Exception as error:  # its mutations would prove nothing
            finding = _finding(kind, -1, "not mutated", f"{type(error).__name__}: {error}")
            return Tally(kind=kind.name, refused=0, accepted=0, findings=(finding,))
        shutil.rmtree(folder)
        for number in range(first, first + count):
            shutil.copytree(kind.template(), folder)
            what = "not mutated"
            try:
                what = mutate(kind, folder, random.Random(f"{seed}/{kind.name}/{number}"))
                with _limited(SECONDS):
                    kind.sign(folder)
                    kind.use(folder)
                accepted += 1
            except DistillError as error:
                refused += 1
                if not str(error).strip():
                    findings.append(_finding(kind, number, what, "an error without a message"))
            except HangError:
                findings.append(_finding(kind, number, what, "a hang"))
            except SilentDifferenceError as error:
                findings.append(_finding(kind, number, what, f"a silent difference: {error}"))
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                outcome = f"{type(error).__name__}: {str(error)[:200]!a}"
                findings.append(_finding(kind, number, what, outcome))
            finally:
                shutil.rmtree(folder)
    return Tally(kind=kind.name, refused=refused, accepted=accepted, findings=tuple(findings))


def mutate(kind: Kind, folder: Path, draw: random.Random) -> str:
    """Mutate the file of ``kind`` in ``folder``; returns what was done."""
    [file] = folder.glob(kind.file)
    if draw.random() < 0.03:
        return _replace(file, draw)
    mutation: Mutation = kind.mutate(file.read_bytes(), draw)
    what, content = mutation
    file.write_bytes(content)
    return what


def _replace(file: Path, draw: random.Random) -> str:
    """Put something else than a file in its place, which a pipe would wait for for ever."""
    what = draw.choice(["a folder", "a pipe", "a dead link", "a link to itself", "huge", "missing"])
    file.unlink()
    if what == "a folder":
        file.mkdir()
    elif what == "a pipe":
        os.mkfifo(file)
    elif what == "a dead link":
        file.symlink_to("/nowhere/at-all")
    elif what == "a link to itself":
        file.symlink_to(file)
    elif what == "huge":
        with file.open("wb") as stream:
            stream.truncate(300 << 20)
    return what


def _finding(kind: Kind, number: int, mutation: str, outcome: str) -> Finding:
    return Finding(
        kind=kind.name, number=number, mutation=mutation, outcome=outcome,
        details=traceback.format_exc(),
    )  # fmt: skip


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def give_up(_signal: int, _frame: FrameType | None) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silence warnings about damaged files, of which there are thousands."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
