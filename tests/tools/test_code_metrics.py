"""What the rows of `tools/code_metrics.py` count, on a workspace of a few lines."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest
from code_metrics import ROOT, format_table, measure_members, measure_tree, read_modules

FILES = {
    "__init__.py": '''
        """A package."""
        from tiny_one.values import Value
        __all__ = ["Value", "call_model"]
    ''',
    "values.py": '''
        """Values."""
        from typing import TYPE_CHECKING, Any

        if TYPE_CHECKING:
            from tiny_one.calls import call_model

        # Why it is a class.
        class Value:
            """A value."""

            def __init__(self, **options: Any) -> None:
                self.name = _used_once()

            def read(self, names: dict[str, Any]) -> str:
                return _used_twice() + _used_twice()

        def _used_once():
            return "a"  # A comment behind code is no comment line.

        def _used_twice() -> str:
            return "b"

        def _recursive() -> str:
            return _recursive()  # With a caller it would have two references.
    ''',
    "calls.py": '''
        """Calls."""
        from . import values

        def call_model() -> values.Value:
            """Call.

            Three lines that are no code.
            """
            def finish() -> values.Value:
                return values.Value()

            return finish()
    ''',
    "lazy.py": '''
        """Lazy."""
        from tiny_one.eager import name

        def load() -> object: ...
    ''',
    "eager.py": '''
        """Eager."""
        name = ""

        def load_lazily() -> object:
            """Load."""
            from tiny_one import lazy

            return lazy
    ''',
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "packages" / "tiny-one"
    source = folder / "src" / "tiny_one"
    source.mkdir(parents=True)
    (folder / "pyproject.toml").write_text('[project]\nname = "tiny-one"\nversion = "1.0.0"\n')
    for name, text in FILES.items():
        (source / name).write_text(dedent(text).lstrip())
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_tiny.py").write_text("a\n" * 30)
    return tmp_path


def test_rows_of_a_tree(tree):
    modules = read_modules(tree)
    lines = sum(m.lines for m in modules)
    rows = measure_tree(tree, modules, with_types=False)
    assert rows["modules"] == "5"
    assert rows["longest file"] == "24 (`values.py`)"
    assert rows["longest class"] == "8 (`Value`)"
    assert rows["lines of a function: max"] == "5"  # call_model without its docstring
    assert rows["single-use private helpers per 1,000 lines"] == f"{2000 / lines:.1f}"
    assert rows["names in `__all__`"] == "2"
    assert rows["import cycles"] == "2"  # values and calls, lazy and eager
    assert rows["import cycles without imports in functions"] == "1"
    assert rows["`Any` in public signatures"] == "2"
    assert rows["comment lines per line of code"] == "3.7 %"  # 1 of 27
    assert rows["public docstrings"] == "60.0 %"  # not Value.read and load
    assert rows["fully annotated"] == "87.5 %"  # not _used_once
    assert rows["test lines per line of code"] == f"{30 / lines:.2f}"
    assert measure_members(modules) == {"tiny-one": f"{lines} / 5 / 2"}


def test_two_trees_are_shown_side_by_side():
    assert format_table("tree", {"old": {"a": "1", "b": "2"}, "new": {"a": "3"}}).splitlines() == [
        "| tree | old | new |",
        "| - | -: | -: |",
        "| a | 1 | 3 |",
        "| b | 2 | - |",
    ]


def test_a_folder_that_is_no_workspace_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"packages/\*/pyproject.toml.*root of a checkout"):
        read_modules(tmp_path)


def test_this_repository_can_be_measured():
    modules = read_modules(ROOT)
    assert len(measure_members(modules)) == len({m.member for m in modules}) > 1
    assert "-" not in measure_tree(ROOT, modules, with_types=False).values()
