"""The tables of families by methods, from the results of their test."""

from __future__ import annotations

import datetime
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from attrs import frozen
from distill_runtime import replace_file

from docs.sections import ROOT

PAGE = ROOT / "docs" / "reference" / "families.md"
REFUSED, EXPORTED = "refused: ", "exported: "
_TABLE = re.compile(r"(?<=<!-- made by: make families -->\n).*?(?=<!-- end -->)", re.S)
_NEEDS = re.compile(r"needs (.*?), which family")


@frozen(kw_only=True)
class Cell:
    """What came of one family by one method.

    Attributes:
        outcome: how the stock pipeline's clip compares; or ``refused: `` and the reason, or
            ``exported: `` and why nothing compares.
        features: of the family, by the title of their column.
    """

    family: str
    method: str
    outcome: str
    features: Mapping[str, str]


def read_cells(results: Iterable[Path]) -> list[Cell]:
    """Read the cells of JUnit files.

    Raises:
        SystemExit: a cell failed, or there is none.
    """
    cells: list[Cell] = []
    for file in results:
        # Our own test wrote it a moment ago.
        for case in ET.parse(file).iter("testcase"):
            found = {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
            if "family" not in found:
                continue
            if case.find("failure") is not None or case.find("error") is not None:
                raise SystemExit(f"{case.attrib['name']} failed; the tables are of what passes")
            features = {
                name.removeprefix("feature "): value
                for name, value in found.items()
                if name.startswith("feature ")
            }
            cells.append(
                Cell(
                    family=found["family"], method=found["method"], outcome=found["outcome"],
                    features=features,
                )
            )  # fmt: skip
    if not cells:
        raise SystemExit("no cell in these results; run `make families`")
    return cells


def render(cells: Sequence[Cell]) -> str:
    """Write both tables, with their date and versions, and the reasons of refusals."""
    families = list(dict.fromkeys(cell.family for cell in cells))
    methods = list(dict.fromkeys(cell.method for cell in cells))
    outcomes = {(cell.family, cell.method): cell.outcome for cell in cells}
    reasons: list[str] = []

    def show(family: str, method: str) -> str:
        outcome = outcomes.get((family, method), "")
        prefix = next((p for p in (REFUSED, EXPORTED) if outcome.startswith(p)), None)
        if prefix is None:
            return outcome
        needs = _NEEDS.search(outcome)
        reason = outcome.removeprefix(prefix)
        if needs:
            reason = f"The method needs {_code(needs[1])}, and the family does not state it."
        if reason not in reasons:
            reasons.append(reason)
        return f"{'no' if prefix == REFUSED else 'yes'} ({reasons.index(reason) + 1})"

    today = datetime.date.today().isoformat()
    lines = [
        f"Run on {today} with distill-methods {version('distill-methods')}, "
        f"diffusers {version('diffusers')}.",
        "",
        f"| family | {' | '.join(f'`{method}`' for method in methods)} |",
        f"|---|{'---|' * len(methods)}",
    ]
    for family in families:
        row = " | ".join(show(family, method) for method in methods)
        lines.append(f"| {family} | {row} |")
    lines.append("")
    lines += [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    columns = list(dict.fromkeys(name for cell in cells for name in cell.features))
    features = {cell.family: cell.features for cell in cells if cell.features}
    lines += ["", f"| family | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for family in families:
        row = " | ".join(features.get(family, {}).get(name, "") for name in columns)
        lines.append(f"| {family} | {row} |")
    return "\n".join([*lines, "", ""])


def _code(reason: str) -> str:
    return ", ".join(f"`{name}`" for name in reason.split(", "))


def write_tables(results: Iterable[Path], page: Path = PAGE) -> None:
    """Put the tables into their page."""
    tables = render(read_cells(results))
    text, count = _TABLE.subn(lambda _: tables, page.read_text())
    if count != 1:
        raise SystemExit(
            f"{page} has no place for the tables: a comment before them, and one after"
        )
    with replace_file(page) as staging:
        staging.write_text(text)
