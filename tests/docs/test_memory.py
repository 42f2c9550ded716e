"""The table of memory is that of the planner and of the run files as they are."""

from __future__ import annotations

import re

import pytest
from docs.memory import PROCESSES, RUN_FILES, MemoryRow, plan_rows, read_rows, render_row


def test_the_table_has_every_run_file():
    names = [re.match(r"\| \[([^\]]+)\]", row)[1] for row in read_rows()]
    assert list(dict.fromkeys(names)) == list(RUN_FILES)
    assert all(row.count("|") == len(PROCESSES) + 3 for row in read_rows())


def test_a_row_says_what_fits():
    row = MemoryRow(
        name="wan/a",
        strategy="fsdp2",
        is_written=False,
        peaks={1: 2 * 10**11, 8: 80 * 10**9, 16: 10**11, 64: None},
    )
    assert render_row(row) == (
        "| [wan/a](../../configs/wan/a.yaml) | `strategy: fsdp2` | 200.0 | **80.0** | 100.0 |  |"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_FILES)
def test_the_table_is_not_stale(name):
    planned = [render_row(row) for row in plan_rows(name)]
    assert [row for row in read_rows() if row.startswith(f"| [{name}]")] == planned
