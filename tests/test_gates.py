"""Lint, format and types: what `make gates` checks, as tests, so that nobody forgets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from workspace import ROOT

BIN = Path(sys.executable).parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    tool, *arguments = command
    return subprocess.run(
        [str(BIN / tool), *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_has_no_complaint(command: tuple[str, ...]):
    result = run("ruff", *command, ".")
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_type_checker_finds_no_error():
    result = run("basedpyright", "--pythonpath", sys.executable, "--outputjson")
    report = json.loads(result.stdout)
    errors = [
        f"{Path(diagnostic['file']).relative_to(ROOT)}:{diagnostic['range']['start']['line'] + 1}: "
        f"{diagnostic['message'].splitlines()[0]} ({diagnostic['rule']})"
        for diagnostic in report["generalDiagnostics"]
        if diagnostic["severity"] == "error"
    ]
    assert errors == [], "\n".join(["", *errors])
    assert report["summary"]["filesAnalyzed"] > 100  # It looked at all packages.
