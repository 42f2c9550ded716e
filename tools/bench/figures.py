"""Ratios with their spread, a table of them, and what got slower since a stored one."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from attrs import asdict, frozen


@frozen
class Figure:
    """One ratio, measured several times in one run.

    Attributes:
        low, high: the quartiles.
        count: how often it was measured.
    """

    name: str
    middle: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, name: str, ratios: Sequence[float]) -> Figure:
        """Take the median and the quartiles of ``ratios``, of which there are two or more."""
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(name, middle, low, high, len(ratios))

    def line(self) -> str:
        """Write it as a row of a table."""
        return f"{self.name:58} {self.middle:7.3f}  {self.low:.3f}-{self.high:.3f}  {self.count:>4}"


HEAD = f"{'ratio':58} {'median':>7}  {'quartiles':13} {'count':>4}"


def time_in_turns(
    name: str,
    ours: Callable[[], object],
    other: Callable[[], object],
    clock: Callable[[], float],
    repeats: int,
) -> Figure:
    """Return the time of ``ours`` over that of ``other``, pair by pair; who is first changes."""
    ratios = []
    for turn in range(repeats + 1):
        times = {}
        for call in (ours, other) if turn % 2 else (other, ours):
            began = clock()
            call()
            times[call] = clock() - began
        ratios.append(times[ours] / times[other])
    return Figure.of(name, ratios[1:])  # the first pair chose kernels and took memory


def save(figures: Sequence[Figure], file: Path, machine: str) -> None:
    """Write figures for ``load``."""
    values = {"machine": machine, "figures": [asdict(figure) for figure in figures]}
    file.write_text(json.dumps(values, indent=1) + "\n")


def load(file: Path) -> Mapping[str, Figure]:
    """Read figures by name."""
    values = json.loads(file.read_text())
    return {value["name"]: Figure(**value) for value in values["figures"]}


def find_slower(figures: Sequence[Figure], before: Mapping[str, Figure]) -> list[str]:
    """Say which ratios rose by more than the spread of both measurements: even the lower quartile
    now is above the higher one then, by as much as they spread."""
    found = []
    for figure in figures:
        known = before.get(figure.name)
        if known is None:
            continue
        spread = max(figure.high - figure.low, known.high - known.low)
        if figure.low > known.high and figure.middle - known.middle > spread:
            found.append(
                f"{figure.name}: {figure.middle:.3f} ({figure.low:.3f}-{figure.high:.3f}), before "
                f"{known.middle:.3f} ({known.low:.3f}-{known.high:.3f})"
            )
    return found
