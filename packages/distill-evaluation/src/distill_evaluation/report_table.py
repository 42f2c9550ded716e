"""A report as text: a table that fits a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distill_protocols import MetricNumber

from distill_evaluation.report_files import EntryReport

WIDTH = 100
"""Columns of a terminal; what is wider goes on in a second table."""
_GAP = "  "


def format_table(
    rows: Sequence[EntryReport], numbers: Mapping[str, MetricNumber], *, grey: bool
) -> str:
    """Write the rows as aligned text: numbers in their order, then what a clip costs.

    Args:
        grey: the judge sees no colours, which is said below where it was asked.
    """
    columns = [
        ["FD" if name == "fd" else name, *(_cell(row, name, number.digits) for row in rows)]
        for name, number in numbers.items()
    ]
    columns.append(["s/clip", *(f"{row.seconds_per_clip:.4f}" for row in rows)])
    columns.append(["calls/clip", *(str(row.model_calls_per_clip) for row in rows)])
    names = _left(["sampled by", *(row.name for row in rows)])
    weights = _left(["weights", *(row.weights for row in rows)])
    blocks = [[names, weights]]
    for column in columns:
        width = max(map(len, column))
        cells = [cell.rjust(width) for cell in column]
        if len(_GAP.join([part[0] for part in blocks[-1]] + cells[:1])) > WIDTH:
            blocks.append([names])
        blocks[-1].append(cells)
    text = "\n\n".join(
        "\n".join(_GAP.join(line) for line in zip(*block, strict=True)) for block in blocks
    )
    if grey and any(number.by_judge for number in numbers.values()):
        text += "\n\nThe judge averages colours away: FD and its answers tell nothing of them."
    return text


def _cell(row: EntryReport, name: str, digits: int) -> str:
    return f"{row.numbers[name]:.{digits}f}" if name in row.numbers else "-"


def _left(cells: Sequence[str]) -> list[str]:
    width = max(map(len, cells))
    return [cell.ljust(width) for cell in cells]
