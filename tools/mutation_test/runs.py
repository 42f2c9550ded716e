"""Run chosen tests on a tree, in a fork of this process that has imported what tests import."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mutation_test.line_map import PYTEST_OPTIONS, test_environment

NOT_IMPORTED = ("pytest", "_pytest", "xdist", "tests", "coverage", "sitecustomize", "__main__")
"""Modules of pytest, which imports its own, of tests and of a map run."""

NOTHING_FAILED = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)


@dataclass(frozen=True)
class Selection:
    """Tests to run, in their order, after the tests of the same files that no map knows.

    Attributes:
        tests: ids of the chosen tests.
        files: paths below the tree that hold them.
        known: ids of all tests that were measured.
        seconds: what the chosen ones took then.
    """

    tests: Sequence[str]
    files: Collection[str]
    known: Collection[str]
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """How a run ended: "killed" (by ``test``), "timeout" or "survived"."""

    result: str
    test: str = ""


def import_modules(names: Sequence[str], tree: Path) -> None:
    """Import what tests import, and nothing of ``tree``: forks have it then and take no time.

    Raises:
        RuntimeError: a module started a thread, with which no fork is safe.
    """
    own = {path.stem for part in ("*/*/src/*", "tests/*", "tools/*") for path in tree.glob(part)}
    for name in names:
        if name not in sys.modules and name.partition(".")[0] not in {*own, *NOT_IMPORTED}:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
            if threading.active_count() > 1:
                raise RuntimeError(f"Importing {name} started a thread: add it to NOT_IMPORTED.")


def run_tests(tree: Path, selection: Selection, timeout: float) -> Outcome:
    """Run tests of ``tree`` until the first fails, for ``timeout`` seconds at most."""
    if not selection.files:
        return Outcome("survived")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _run_in_child(tree, selection, writer)
    os.close(writer)
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid and os.waitstatus_to_exitcode(status) in NOTHING_FAILED:
                return Outcome("survived")
            if pid:
                return Outcome("killed", os.read(reader, 4096).decode())
            time.sleep(0.05)
        return Outcome("timeout")
    finally:
        os.close(reader)
        # And what the tests have left behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def _run_in_child(tree: Path, selection: Selection, writer: int) -> None:
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nothing, stream)
        os.chdir(tree)
        os.environ.update(test_environment(tree))
        sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
        options = [*PYTEST_OPTIONS, "-x", f"--basetemp={tree.parent / 'temporary'}"]
        code = pytest.main([*options, *selection.files], plugins=[_Selected(selection, writer)])
    finally:
        os._exit(code)


class _Selected:
    """A plugin that keeps the selected tests, and writes the id of the one that fails."""

    def __init__(self, selection: Selection, writer: int) -> None:
        self._selection = selection
        self._writer = writer

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        known = set(self._selection.known)
        place = {test: n for n, test in enumerate(self._selection.tests)}
        kept = [item for item in items if item.nodeid in place or item.nodeid not in known]
        items[:] = sorted(kept, key=lambda item: place.get(item.nodeid, -1))

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._write(report)

    def pytest_collectreport(self, report: Any) -> None:
        self._write(report)

    def _write(self, report: Any) -> None:
        if report.failed:
            os.write(self._writer, report.nodeid.encode()[:4096])
