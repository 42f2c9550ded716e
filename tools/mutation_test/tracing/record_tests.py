"""Note which test runs, what it takes and which shared fixtures it has: a plugin of pytest.

A fixture of a module or of the session is set up during one test, and what it reached counts for
every test that has it. So such a fixture is a context of its own.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import sitecustomize

_contexts = [""]
_seconds: dict[str, float] = {}
_fixtures: dict[str, list[str]] = {}
_failed: set[str] = set()
_modules: list[str] = []


@contextlib.contextmanager
def _context(name: str) -> Iterator[None]:
    _contexts.append(name)
    _enter(name)
    try:
        yield
    finally:
        _contexts.pop()
        _enter(_contexts[-1])


def _enter(name: str) -> None:
    sitecustomize.NOW.write_text(name)
    sitecustomize.enter_test()


def pytest_collection_finish() -> None:
    _modules[:] = sys.modules


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: Any) -> Any:
    began = time.monotonic()
    with _context(item.nodeid):
        result = yield
    _seconds[item.nodeid] = time.monotonic() - began
    _fixtures[item.nodeid] = [fixture_context(name) for name in item.fixturenames]
    return result


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any) -> Any:
    if fixturedef.scope == "function":
        return (yield)
    with _context(fixture_context(fixturedef.argname)):
        return (yield)


def fixture_context(name: str) -> str:
    return f"fixture {name}"


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        _failed.add(report.nodeid)


def pytest_sessionfinish() -> None:
    notes = {
        "seconds": _seconds, "fixtures": _fixtures, "failed": sorted(_failed), "modules": _modules
    }  # fmt: skip
    (sitecustomize.FOLDER / "notes.json").write_text(json.dumps(notes))
