"""Measure which tests of a folder reach which line, and keep it for the commit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from coverage import Coverage, CoverageData

TRACING = Path(__file__).parent / "tracing"


@dataclass(frozen=True)
class LineMap:
    """What the tests of one folder reach.

    Attributes:
        folder: name of the folder below ``tests``.
        commit: the tree that was measured.
        seconds: of each test, by its id, while lines were measured.
        modules: what was imported once the tests were collected, in order.
        failed: tests that failed, which can notice nothing.
    """

    folder: str
    commit: str
    tree: str
    seconds: dict[str, float]
    fixtures: dict[str, list[str]]
    modules: list[str]
    failed: list[str]
    lines: CoverageData

    @property
    def passing(self) -> set[str]:
        return self.seconds.keys() - set(self.failed)

    def find_tests(self, file: str, lines: range | None = None) -> set[str]:
        """Find the tests that run one of ``lines`` of ``file``, or anything of it."""
        by_line = self.lines.contexts_by_lineno(f"{self.tree}/{file}")
        found = {c for n, names in by_line.items() if lines is None or n in lines for c in names}
        return {
            test for test in self.passing
            if test in found or not found.isdisjoint(self.fixtures[test])
        }  # fmt: skip


def read_line_map(cache: Path) -> LineMap | None:
    """Read a map that ``build_line_map`` kept at ``cache``, or None."""
    if not (cache / "notes.json").is_file():
        return None
    lines = CoverageData(str(cache / "lines"))
    lines.read()
    return LineMap(**json.loads((cache / "notes.json").read_text()), lines=lines)


def build_line_map(tree: Path, folder: str, commit: str, cache: Path) -> LineMap:
    """Run the tests of a folder of ``tree`` under coverage.py, and keep what they reached.

    Args:
        folder: name of the folder below ``tests``.
        commit: what ``tree`` is a copy of; it is written into the map.
        cache: folder that is made anew.

    Raises:
        SystemExit: pytest did not get to its end.
    """
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    (cache / "now").write_text("")
    environment = test_environment(tree)
    environment["PYTHONPATH"] = os.pathsep.join([str(TRACING), environment["PYTHONPATH"]])
    environment |= {"MUTATION_TEST_FOLDER": str(cache), "MUTATION_TEST_TREE": str(tree)}
    options = [*PYTEST_OPTIONS, "-p", "record_tests"]
    command = [sys.executable, "-m", "pytest", *options, f"tests/{folder}"]
    with (cache / "pytest.log").open("w") as log:
        subprocess.run(command, cwd=tree, env=environment, check=False, stdout=log, stderr=log)
    if not (cache / "notes.json").is_file():
        raise SystemExit(f"The tests in tests/{folder} did not run to their end. See {log.name}.")
    together = Coverage(data_file=cache / "lines", config_file=False)
    together.combine([str(cache)])
    together.save()
    notes = json.loads((cache / "notes.json").read_text())
    notes |= {"folder": folder, "commit": commit, "tree": str(tree)}
    (cache / "notes.json").write_text(json.dumps(notes))
    line_map = read_line_map(cache)
    assert line_map is not None
    return line_map


PYTEST_OPTIONS = ("-n", "0", "-q", "-p", "no:cacheprovider")


def test_environment(tree: Path) -> dict[str, str]:
    """Return the environment in which the tests of ``tree`` import the sources of ``tree``."""
    sources = [str(path) for path in sorted(tree.glob("*/*/src"))]
    return os.environ | {"PYTHONPATH": os.pathsep.join(sources), "HF_HUB_OFFLINE": "1"}
