"""Markdown files: how long their lines are, and that relative links lead to files.

And what the option reference is made of: it says something about every key.
"""

from __future__ import annotations

import re
import subprocess

import pytest
from docs.options import read_options
from docs.sections import EXAMPLES, all_configs, example_of
from workspace import ROOT

PROSE_COLUMNS = 100
TABLE_COLUMNS = 180
"""A cell of a table cannot be wrapped; a paragraph belongs below the table."""

LINK_ALONE = re.compile(r"\W*\[[^\]]+\](: |\()\S+\W*")

DOCUMENTS = sorted(
    subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()
)  # fmt: skip


def prose_and_tables(text: str) -> list[tuple[int, str]]:
    """Return the lines outside of fenced code blocks with their numbers."""
    lines, in_code = [], False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code:
            lines.append((number, line))
    return lines


def long_lines(text: str) -> list[int]:
    """Return the numbers of lines that are too long for prose or for a table."""
    numbers = []
    for number, line in prose_and_tables(text):
        limit = TABLE_COLUMNS if line.lstrip().startswith("|") else PROSE_COLUMNS
        if len(line) > limit and not LINK_ALONE.fullmatch(line):
            numbers.append(number)
    return numbers


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("a " * 50 + "a", [1]),
        ("a\n- " + "a" * 99, [2]),
        ("| " + "a" * 120 + " |", []),
        ("| " + "a" * 180 + " |", [1]),
        ("```\n" + "a" * 120 + "\n```\n" + "a" * 120, [4]),
        (f"[page]: https://example.org/{'a' * 100}", []),
        (f"- [page](https://example.org/{'a' * 100}).", []),
    ],
    ids=["prose", "list", "table", "long-table", "code", "reference", "link"],
)
def test_long_lines_are_those_of_prose_and_tables(text, numbers):
    assert long_lines(text) == numbers


@pytest.mark.parametrize("document", DOCUMENTS)
def test_lines_are_wrapped(document):
    assert long_lines((ROOT / document).read_text()) == [], (
        f"{document}: wrap prose at {PROSE_COLUMNS} columns; a row of a table has at most "
        f"{TABLE_COLUMNS}, as longer cells read better below it"
    )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_lead_to_files(document):
    text = "\n".join(line for _, line in prose_and_tables((ROOT / document).read_text()))
    targets = re.findall(r"\]\(([^)\s#]+)", text) + re.findall(r"(?m)^\[[^\]]+\]: ([^\s#]+)", text)
    folder = (ROOT / document).parent
    missing = [
        target for target in targets
        if not re.match(r"\w+:", target)
        and not (folder / target).exists()
    ]  # fmt: skip
    assert missing == []


def test_every_page_is_in_the_navigation_of_the_site():
    nav = (ROOT / "mkdocs.yml").read_text()
    pages = [document for document in DOCUMENTS if document.startswith("docs/")]
    missing = [page for page in pages if page.removeprefix("docs/") not in nav]
    assert missing == [], "add these to nav in mkdocs.yml, or nobody finds them"


def test_every_option_is_described_and_has_an_example():
    # read_options names a key that no Attributes: describes.
    missing = [
        f"{config.__name__}.{option.name}"
        for config in all_configs()
        for option in read_options(config)
        if example_of(config, option) is None
    ]
    assert missing == [], (
        f"no shipped run file and no guide sets these, so the option reference has no example of "
        f"them; add one line each to {EXAMPLES.relative_to(ROOT)}"
    )
