"""Every source that a shipped run file or a method's page names is pinned to a commit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(f for f in (ROOT / "configs").glob("*/*.yaml") if f.parent.name != "tiny")
PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
PIN = re.compile(
    r"^#   (\w+) +([\w.-]+/[\w.-]+)@([0-9a-f]{8})\n((?:#          \S+\n)+)", re.MULTILINE
)
ROW = re.compile(r"^\| (\w+) \| ([\w.-]+/[\w.-]+) \| `([0-9a-f]{8})` \|", re.MULTILINE)


def read_pins() -> dict[str, str]:
    """Read abbreviation -> "repository@commit" off the table of the methods' index."""
    text = (ROOT / "docs" / "methods" / "README.md").read_text()
    return {name: f"{repository}@{commit}" for name, repository, commit in ROW.findall(text)}


NAME = re.compile(rf"\b({'|'.join(read_pins())}|FVS)\b")
"""Abbreviations of repositories; what they stand for is in docs/methods/README.md."""


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_a_run_file_pins_what_its_comments_name(file):
    text = file.read_text()
    pins = {name: f"{repository}@{commit}" for name, repository, commit, _ in PIN.findall(text)}
    comments = re.findall(r"#(.*)$", PIN.sub("", text), re.MULTILINE)
    named = {name for comment in comments for name in NAME.findall(comment)}
    assert named == set(pins)
    table = read_pins() | {"FVS": read_pins()["FV"]}
    assert pins.items() <= table.items()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_pinned_sources_alone(page):
    assert set(NAME.findall(page.read_text())) <= set(read_pins())
