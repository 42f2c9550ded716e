"""Contracts that the type checker proves: every shipped adapter with every shipped method."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from distill_runtime import load_plugin, plugin_names
from workspace import ROOT

HERE = Path(__file__).parent
PAIRS, REFUSED = HERE / "pairs.py", HERE / "refused.py"
MARK = "# expect-error"


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[int, str]]:
    """Return messages by file name and line."""
    checker = Path(sys.executable).parent / "basedpyright"
    command = [str(checker), "--pythonpath", sys.executable, "--outputjson"]
    result = subprocess.run(
        [*command, str(PAIRS), str(REFUSED)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    report = json.loads(result.stdout)
    assert report["summary"]["filesAnalyzed"] == 2
    by_line: dict[str, dict[int, str]] = {PAIRS.name: {}, REFUSED.name: {}}
    for entry in report["generalDiagnostics"]:
        if entry["severity"] == "error":
            line = entry["range"]["start"]["line"] + 1
            by_line[Path(entry["file"]).name][line] = f"{entry['message']} ({entry.get('rule')})"
    return by_line


def test_every_method_takes_every_adapter(errors: dict[str, dict[int, str]]):
    assert errors[PAIRS.name] == {}


def test_the_type_checker_refuses_broken_contracts_on_their_lines(
    errors: dict[str, dict[int, str]],
):
    lines = REFUSED.read_text().splitlines()
    expected = {n for n, line in enumerate(lines, 1) if line.rstrip().endswith(MARK)}
    assert expected
    unexpected = {n: text for n, text in errors[REFUSED.name].items() if n not in expected}
    missed = {n: lines[n - 1].strip() for n in expected if n not in errors[REFUSED.name]}
    assert (unexpected, missed) == ({}, {})


def names_in(definition: str) -> set[str]:
    """Return the names that a function of ``pairs.py`` uses, or the value of a constant of it."""
    for node in ast.parse(PAIRS.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == definition:
            return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == definition:
            assert node.value is not None
            return {name.id for name in ast.walk(node.value) if isinstance(name, ast.Name)}
    raise AssertionError(definition)


def test_no_shipped_method_or_family_is_left_out():
    methods = [load_plugin("distill.methods", n) for n in plugin_names("distill.methods")]
    for plugin in methods:
        assert plugin.config_class.__name__ in names_in("every_method")
        assert plugin.implementation.split(":")[1] in names_in("every_method")
    families = len(plugin_names("distill.families"))
    assert len(names_in("ADAPTERS")) == families
    # Methods and callbacks are imported by their names, a family under a name of its own.
    others = {*plugin_names("distill.methods"), *plugin_names("distill.callbacks")}
    assert others <= names_in("PLUGINS")
    assert len(names_in("PLUGINS") - others) == families
