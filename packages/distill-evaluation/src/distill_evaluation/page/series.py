"""``metrics.jsonl`` as curves."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from attrs import define, field, frozen
from distill_runtime import UnreadableFileError, parse_json

MOST_SERIES = 600
"""Names that are read; a run logs some dozens."""
MOST_NAME = 200
"""Characters of a name."""
MOST_LINE = 1 << 20
"""Bytes of a line."""
DRAWN_POINTS = 600
"""Of one curve: more than a screen shows beside each other."""
_LAST_TIME = 253_402_214_400.0
"""Unix seconds of the end of 9999, after which a time has no date."""
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@define(eq=False)
class Series:
    """One curve: values by iteration, in ascending order."""

    iterations: list[int] = field(factory=list)
    values: list[float] = field(factory=list)

    def add(self, iteration: int, value: float) -> None:
        """Append a value; those of this and later iterations, which a killed process logged, give
        way."""
        while self.iterations and self.iterations[-1] >= iteration:
            self.iterations.pop()
            self.values.pop()
        self.iterations.append(iteration)
        self.values.append(value)

    def __len__(self) -> int:
        return len(self.values)


@define(eq=False)
class MetricsReader:
    """Reads ``metrics.jsonl``, and later only what has come to it since.

    Attributes:
        series: by name.
        times: Unix seconds of the lines.
        skipped: lines and names that could not be used.
    """

    path: Path
    series: dict[str, Series] = field(factory=dict)
    times: Series = field(factory=Series)
    skipped: int = 0
    _position: int = 0
    _inode: int = -1

    def update(self) -> None:
        """Read what is new. A file that is missing has no lines; one that was replaced by another
        is read from its beginning."""
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                return  # opening a pipe would wait for whoever writes to it
            with self.path.open("rb") as file:
                self._restart_if_replaced(file.fileno())
                file.seek(self._position)
                while line := file.readline(MOST_LINE):
                    if not line.endswith(b"\n") and len(line) < MOST_LINE:
                        break  # it is being written
                    self._position += len(line)
                    self._add_line(line)
        except OSError:
            return

    def _restart_if_replaced(self, file: int) -> None:
        status = os.fstat(file)
        if status.st_ino != self._inode or status.st_size < self._position:
            self.series, self.times = {}, Series()
            self.skipped = self._position = 0
            self._inode = status.st_ino

    def _add_line(self, line: bytes) -> None:
        try:
            entry = parse_json(line, "a line")
        except UnreadableFileError:
            self.skipped += 1
            return
        iteration = entry.get("iteration") if isinstance(entry, dict) else None
        if type(iteration) is not int or not 0 <= iteration < 10**9:
            self.skipped += 1
            return
        for name, value in entry.items():
            number = _as_number(value)
            if number is None or name == "iteration":
                continue
            if name == "time":
                if 0 <= number <= _LAST_TIME:
                    self.times.add(iteration, number)
                else:
                    self.skipped += 1
            elif name in self.series or self._is_room_for(name):
                self.series.setdefault(name, Series()).add(iteration, number)
            else:
                self.skipped += 1

    def _is_room_for(self, name: str) -> bool:
        return len(self.series) < MOST_SERIES and len(name) <= MOST_NAME


def _as_number(value: object) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return _NOT_FINITE.get(value) if isinstance(value, str) else None


@frozen(kw_only=True)
class Curve:
    """One line of a chart.

    Attributes:
        name: as trackers call it.
        run: place of its run among those of the page.
        points: that it was drawn from, before ``thin_out``.
        x: iterations.
        y: values; None where one is not finite.
    """

    name: str
    run: int
    points: int
    x: Sequence[int]
    y: Sequence[float | None]


@frozen(kw_only=True)
class Panel:
    """Curves that share a chart.

    Attributes:
        group: heading that it stands under.
        help: what it shows, in a few words; may be empty.
    """

    title: str
    group: str
    curves: tuple[Curve, ...]
    help: str = ""


GROUPS = ("Losses", "Quality", "Health", "Distillation", "Gradients", "Learning rates and counts",
          "Speed and memory")  # fmt: skip
"""Headings, the most important first."""
OPEN_CHARTS = 6
"""Groups are open until so many charts are seen."""


def make_panels(runs: Sequence[MetricsReader]) -> list[Panel]:
    """Arrange the curves of all runs as charts: those of one measure and of equal kind together."""
    charts: dict[tuple[int, str], list[Curve]] = {}
    for number, reader in enumerate(runs):
        for name, series in reader.series.items():
            if series:
                group, title = _place_of(name)
                curve = thin_out(name, number, series)
                charts.setdefault((GROUPS.index(group), title), []).append(curve)
    return [
        Panel(title=title, group=GROUPS[group], curves=tuple(curves), help=_HELP.get(title, ""))
        for (group, title), curves in sorted(charts.items(), key=lambda item: _order(item[0]))
    ]


def _place_of(name: str) -> tuple[str, str]:
    """Return the group of a metric, and the title of the chart that it shares with its like."""
    first, _, rest = name.partition("/")
    last = name.rpartition("/")[2]
    if first == "loss" or name.startswith("validation/loss"):
        return "Losses", f"loss/{last}"
    if first == "report":
        return "Quality", f"report: {last}"
    if first in ("metrics", "validation"):
        return "Quality", name.rpartition("/")[0].replace("/", " ") + f": {last}"
    if first == "health":
        return "Health", f"health: {health_parts(rest)[1]}"
    if first == "progress":
        return "Learning rates and counts", f"{rest} seen"
    if first == "grad_norm":
        return "Gradients", "gradient norms"
    if first == "loss_grad_norm":
        return "Gradients", f"gradient norms of {rest.rpartition('/')[0]} by loss"
    if first == "lr":
        return "Learning rates and counts", "learning rates"
    if first == "updates":
        return "Learning rates and counts", "updates"
    if first in ("time", "memory", "samples_per_second") or name == "grad_scale":
        return "Speed and memory", _TIMES.get(first, name)
    if rest:
        return "Distillation", first
    return "Distillation", name


def health_parts(name: str) -> tuple[str, str, str]:
    """Split the name of a signal: whose it is (empty: the student's), the signal, the rest.

    ``teacher/contrast`` and ``data/contrast`` are what ``contrast`` is compared with.
    """
    of, _, rest = name.partition("/")
    if of not in ("data", "teacher") or not rest:
        of, rest = "", name
    signal, _, more = rest.partition("/")
    return of, signal, more


_TIMES = {"time": "seconds", "memory": "memory"}
_HELP = {
    "gradient norms": "before clipping, by optimizer",
    "memory": "peak so far, GB",
    "seconds": "by what takes them",
    "learning rates": "of the next step",
    "updates": "optimizer steps so far",
}
_FIRST_LOSS = ("loss/total_loss",)


def _order(key: tuple[int, str]) -> tuple[int, bool, str]:
    group, title = key
    # The total is a sum of terms, or another role's on each turn: terms say more.
    return group, title in _FIRST_LOSS, title


def thin_out(name: str, run: int, series: Series, most: int = DRAWN_POINTS) -> Curve:
    """Make a curve of at most ``most`` points: of each stretch its lowest and its highest value, in
    their order, so that no spike is lost."""
    count = len(series)
    keep = range(count) if count <= most else sorted(set(_extremes(series.values, most)))
    return Curve(
        name=name,
        run=run,
        points=count,
        x=[series.iterations[i] for i in keep],
        y=[_rounded(series.values[i]) for i in keep],
    )


def _extremes(values: Sequence[float], most: int) -> Iterator[int]:
    stretches = most // 2 - 1
    yield 0
    yield len(values) - 1
    for number in range(stretches):
        stretch = range(number * len(values) // stretches, (number + 1) * len(values) // stretches)
        finite = [i for i in stretch if math.isfinite(values[i])]
        if len(finite) < len(stretch):
            yield next(i for i in stretch if not math.isfinite(values[i]))
        if finite:
            yield min(finite, key=values.__getitem__)
            yield max(finite, key=values.__getitem__)


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None
