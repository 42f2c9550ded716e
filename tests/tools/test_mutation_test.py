"""``tools/mutation_test.py``: what it changes, and that a change reaches the tests."""

from __future__ import annotations

import mutation_test
import pytest

SOURCE = '''"""A docstring."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def clamp(value: "int < 3", low: int = 2) -> int:
    """Another one."""
    if value < low:
        raise ValueError(f"{value} is below {low + 1}")
    print(value)
    return value + 1
'''
EXPECTED = {
    (8, "2", "3"),
    (10, "value < low", "(value <= low)"),
    (10, "value < low", "(not (value < low))"),
    (11, 'raise ValueError(f"{value} is below {low + 1}")', "pass"),
    (12, "print(value)", "pass"),
    (13, "return value + 1", "return None"),
    (13, "value + 1", "(value - 1)"),
    (13, "1", "2"),
}


@pytest.fixture
def member(tmp_path):
    file = tmp_path / "src" / "clamp.py"
    file.parent.mkdir()
    file.write_text(SOURCE)
    return tmp_path


def test_the_changes_of_a_file_leave_docstrings_annotations_and_messages(member):
    mutants = list(mutation_test.find_mutants(member))
    assert {(m.line, m.old, m.new) for m in mutants} == EXPECTED
    for mutant in mutants:
        changed = mutant.source().decode()
        compile(changed, "clamp.py", "exec")
        lines = zip(SOURCE.splitlines(), changed.splitlines(), strict=True)
        assert [n for n, (old, new) in enumerate(lines, 1) if old != new] == [mutant.line]


@pytest.mark.parametrize(
    ("change", "result"), [("value + 1", "killed"), ("print(value)", "survived")]
)
def test_the_tests_of_a_tree_see_the_changed_source(member, tmp_path, change, result):
    tree = tmp_path / "tree"
    source, tests = tree / "packages" / "clamp" / "src", tree / "tests" / "clamp"
    source.mkdir(parents=True)
    tests.mkdir(parents=True)
    (tree / "pytest.ini").write_text("[pytest]\n")
    (tests / "test_clamp.py").write_text(
        "from clamp import clamp\n\n\ndef test_clamp():\n    assert clamp(3) == 4\n"
    )
    mutant = next(m for m in mutation_test.find_mutants(member) if m.old == change)
    (source / "clamp.py").write_bytes(mutant.source())
    assert mutation_test.run_tests(tree, ("clamp",), 60) == result
