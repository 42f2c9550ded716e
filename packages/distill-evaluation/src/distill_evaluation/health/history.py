"""What was measured of a run, as the rules see it. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from attrs import define, field, frozen


@frozen
class Point:
    """A number, and the iteration in which it was measured."""

    iteration: int
    value: float


@define
class History:
    """Numbers by name, in the order in which they were measured.

    Attributes:
        steps: iterations of the whole run.
        references: by what was measured once ("teacher", "data"), numbers by name.
        series: numbers of the student and of the training, by name.
    """

    steps: int
    references: dict[str, dict[str, float]] = field(factory=dict)
    series: dict[str, list[Point]] = field(factory=dict)

    def add(self, iteration: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.series.setdefault(name, []).append(Point(iteration, value))

    @property
    def iterations(self) -> list[int]:
        """The iterations in which something was measured, rising."""
        return sorted({point.iteration for points in self.series.values() for point in points})

    def values(self, name: str) -> list[float]:
        """Return all values of ``name``; empty: it is not measured."""
        return [point.value for point in self.series.get(name, ())]

    def newest(self, name: str, count: int) -> list[float]:
        """Return the newest values; empty where there are fewer than ``count``."""
        values = self.values(name)
        return values[-count:] if len(values) >= count else []

    def reference(self, name: str, preferred: Iterable[str]) -> tuple[str, float] | None:
        """Return the first of the references that has ``name``, with its value."""
        for owner in preferred:
            if name in self.references.get(owner, {}):
                return owner, self.references[owner][name]
        return None

    def state_dict(self) -> dict[str, object]:
        """Return JSON values; empty before anything was measured."""
        if not self.references and not self.series:
            return {}
        series = {
            name: [[point.iteration, point.value] for point in points]
            for name, points in self.series.items()
        }
        return {"references": self.references, "series": series}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what ``state_dict`` gave."""
        references = cast(Mapping[str, Mapping[str, float]], state.get("references", {}))
        self.references = {name: dict(numbers) for name, numbers in references.items()}
        series = cast(Mapping[str, list[tuple[int, float]]], state.get("series", {}))
        self.series = {
            name: [Point(iteration, value) for iteration, value in points]
            for name, points in series.items()
        }
