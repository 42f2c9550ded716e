"""``tools/mutation_test``: what it changes, and that the tests that reach a change run on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mutation_test.mutants import find_mutants

TOOL = Path(__file__).resolve().parents[2] / "tools" / "mutation_test"
SOURCE = '''"""A docstring."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def clamp(value: "int < 3", low: int = 2) -> int:
    """Another one."""
    if value < low:
        raise ValueError(f"{value} is below {low + 1}")
    print(value)
    return max(
        value + 1
    )
'''
EXPECTED = {
    ("8", True, "2", "3"),
    ("10", False, "value < low", "(value <= low)"),
    ("10", False, "value < low", "(not (value < low))"),
    ("11", False, 'raise ValueError(f"{value} is below {low + 1}")', "pass"),
    ("12", False, "print(value)", "pass"),
    ("13-14", False, "value + 1", "(value - 1)"),
    ("13-14", False, "1", "2"),
}


def test_the_changes_of_a_file_leave_docstrings_annotations_and_messages(tmp_path):
    file = tmp_path / "packages" / "clamp" / "src" / "clamp.py"
    file.parent.mkdir(parents=True)
    file.write_text(SOURCE)
    mutants = list(find_mutants(tmp_path, file.parents[1]))
    found = {("-".join(map(str, m.lines)), m.runs_at_import, m.old, m.new) for m in mutants}
    assert found == EXPECTED
    for mutant in mutants:
        changed = mutant.change(file.read_bytes()).decode()
        compile(changed, "clamp.py", "exec")
        lines = zip(SOURCE.splitlines(), changed.splitlines(), strict=True)
        assert [n for n, (old, new) in enumerate(lines, 1) if old != new] == [mutant.lines[-1]]


PACKAGES = {
    "packages/lines/pyproject.toml": "",
    "packages/lines/src/lines.py": """
def shared(x):
    return x + 1
def forked(x):
    return x + 2
def spawned(x):
    return x + 3
def held_elsewhere(x):
    return x + 4
def not_held(x):
    return x + 5
def not_reached(x):
    return x + 6
LIMIT = 7
""",
    "tests/lines/test_lines.py": """
import os, subprocess, sys
import lines, pytest

@pytest.fixture(scope="module")
def made(): return lines.shared(1)

def test_first_user(made): assert made
def test_second_user(made): assert made == 2

def test_fork():
    if (child := os.fork()) == 0:
        os._exit(lines.forked(1))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3

def test_spawn():
    subprocess.run([sys.executable, "-c", "import lines; assert lines.spawned(1) == 4"], check=True)

def test_without_a_look(): lines.not_held(1), lines.held_elsewhere(1)
def test_limit(): assert lines.LIMIT == 7
def test_fails(): assert False
""",
    "packages/users/pyproject.toml": "",
    "packages/users/src/users.py": "def use(x): return not x\n",
    "tests/users/test_users.py": """
import lines, users
def test_use(): assert users.use(False) and lines.held_elsewhere(1) == 5
""",
    "pytest.ini": "[pytest]\n",
}
RESULTS = {
    "1": "killed",
    "2": "killed",
    "3": "killed",
    "4": "elsewhere",
    "5": "survived",
    "6": "not reached",
    "7": "killed",
    "not x": "killed",
}


@pytest.mark.slow
def test_each_change_meets_the_tests_that_reach_it(tmp_path):
    for name, content in PACKAGES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / ".gitignore").write_text("outputs/\n__pycache__/\n")
    author = ["-c", "user.name=a", "-c", "user.email=a"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "All"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    run = [sys.executable, TOOL, "--root", tmp_path, "--sample", "1000"]
    listed = subprocess.run([*run, "--list"], check=True, capture_output=True, text=True).stdout
    numbers = {}
    for line in listed.splitlines()[1:]:
        number, _, change = line.partition(": ")
        old, new = (part.strip("'") for part in change.partition(": ")[2].split(" -> "))
        if old in RESULTS and new != "return None":
            numbers[number] = old
    done = subprocess.run([*run, "--only", *numbers], check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    found = {
        numbers[a]: b.partition(" (")[0]
        for a, _, b in (x.partition(": ") for x in lines)
        if a in numbers
    }
    assert found == RESULTS, done.stdout
    assert (
        "left out, as it fails while lines are measured: tests/lines/test_lines.py::test_fails"
        in lines
    )
    assert lines[-1] == "noticed by tests of the package: 62% of 8; by any: 75%"
