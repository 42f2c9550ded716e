"""The table of memory per process, by the planner of ``--dry-run``."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from attrs import evolve, frozen
from distill_protocols import ConfigError
from distill_runfile import RunConfig, read_config
from distill_runfile.planning.memory import Planner
from distill_runtime import counted, replace_file

from docs.sections import ROOT

PAGE = ROOT / "docs" / "reference" / "memory.md"


def _find_run_files() -> tuple[str, ...]:
    """Name all shipped run files that train a model of full size, Wan's first."""
    files = [
        file
        for file in sorted((ROOT / "configs").glob("*/*.yaml"))
        if file.parent.name != "tiny" and re.search("^training:", file.read_text(), re.M)
    ]
    files.sort(key=lambda file: file.parent.name != "wan")
    return tuple(f"{file.parent.name}/{file.stem}" for file in files)


RUN_FILES = _find_run_files()
PROCESSES = (1, 8, 16, 64)
DEVICE = 80 * 10**9
_TABLE = re.compile(r"(?<=<!-- made by: uv run tools/docs memory -->\n).*?(?=<!-- end -->)", re.S)


@frozen(kw_only=True)
class MemoryRow:
    """The plans of one run file under one strategy.

    Attributes:
        name: of the run file, below ``configs/`` and without its ending.
        strategy: of ``training.distributed``.
        is_written: whether the file has this strategy itself.
        peaks: by number of processes, the bytes of the process that needs most; None: the batch
            cannot be divided so, or the strategy cannot hold it.
    """

    name: str
    strategy: str
    is_written: bool
    peaks: dict[int, int | None]


def plan_rows(name: str) -> Iterator[MemoryRow]:
    """Plan a run file as it is, and where it names no strategy with FSDP2 too."""
    first = _read(name, PROCESSES[0])
    written = first.training.distributed.strategy if first else None
    strategies = [written] if written else ["ddp", "fsdp2"]
    for strategy in strategies:
        peaks = {count: _peak(name, count, strategy) for count in PROCESSES}
        is_written = strategy == (written or "ddp")
        yield MemoryRow(name=name, strategy=strategy, is_written=is_written, peaks=peaks)


def _read(name: str, world_size: int) -> RunConfig | None:
    file = ROOT / "configs" / f"{name}.yaml"
    try:
        return read_config(file, planning=True, world_size=world_size)
    except ConfigError:
        return None


def _peak(name: str, world_size: int, strategy: str) -> int | None:
    config = _read(name, world_size)
    if config is None:
        return None
    distributed = evolve(config.training.distributed, strategy=strategy)
    config = evolve(config, training=evolve(config.training, distributed=distributed))
    return Planner(world_size=world_size).run(config).peak


def render_row(row: MemoryRow) -> str:
    """Write one line of the table."""
    cells = [_cell(row.peaks[count]) for count in PROCESSES]
    strategy = row.strategy if row.is_written else f"`strategy: {row.strategy}`"
    return f"| [{row.name}](../../configs/{row.name}.yaml) | {strategy} | {' | '.join(cells)} |"


def _cell(peak: int | None) -> str:
    if peak is None:
        return ""
    text = f"{peak / 1e9:.1f}"
    return f"**{text}**" if peak <= DEVICE else text


def render_table() -> str:
    """Plan all run files and write the table, with its date and versions."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    today = datetime.date.today().isoformat()
    versions = ", ".join(f"{name} {version(name)}" for name in ("distill-runfile", "diffusers"))
    head = " | ".join(counted(count, "process", "processes") for count in PROCESSES)
    lines = [
        f"Planned on {today} with {versions}.",
        "",
        f"| run file | strategy | {head} |",
        f"|---|---|{'---|' * len(PROCESSES)}",
    ]
    for name in RUN_FILES:
        for row in plan_rows(name):
            lines.append(render_row(row))
            print(lines[-1], flush=True)
    return "\n".join([*lines, "", ""])


def write_table(page: Path = PAGE) -> None:
    """Put the table into its page."""
    table = render_table()
    text, count = _TABLE.subn(lambda _: table, page.read_text())
    if count != 1:
        raise SystemExit(f"{page} has no place for the table: a comment before it, and one after")
    with replace_file(page) as staging:
        staging.write_text(text)


def read_rows(page: Path = PAGE) -> list[str]:
    """Read the lines of the table that is in its page."""
    found = _TABLE.search(page.read_text())
    return [line for line in (found[0] if found else "").splitlines() if line.startswith("| [")]
