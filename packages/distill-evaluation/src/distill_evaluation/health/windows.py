"""Means of what a method measures from one check to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from distill_protocols import RankGroup
from distill_runtime import fetch_floats
from torch import Tensor


class Window:
    """Sums by name since the last check. They stay on their device until somebody asks: nobody
    waits for it in between."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor | float, int]] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        """Add a number, 0-d where it is a tensor."""
        total, count = self._sums.get(name, (0.0, 0))
        number = value.detach().double() if isinstance(value, Tensor) else value
        self._sums[name] = (total + number, count + 1)

    def take_means(self, ranks: RankGroup) -> dict[str, float]:
        """Return the mean of each over all ranks that have it, and start anew. All ranks call it
        alike."""
        own, self._sums = self._fetch(), {}
        totals: dict[str, tuple[float, int]] = {}
        for sums in ranks.gather_results(lambda: own):
            for name, (total, count) in sums.items():
                before = totals.get(name, (0.0, 0))
                totals[name] = (before[0] + total, before[1] + count)
        return {name: total / count for name, (total, count) in totals.items()}

    def state_dict(self, ranks: RankGroup) -> dict[str, object]:
        """Return the sums of each rank; empty right after a check. All ranks call it alike."""
        own = {name: list(pair) for name, pair in self._fetch().items()}
        by_rank = ranks.gather_results(lambda: own)
        if not any(by_rank):
            return {}
        return {f"rank-{rank:05d}": sums for rank, sums in enumerate(by_rank)}

    def load_state_dict(self, state: Mapping[str, object], ranks: RankGroup) -> None:
        """Restore what ``state_dict`` gave. With another number of ranks the first takes all, as
        means are over all of them."""
        by_rank = list(cast(Mapping[str, Mapping[str, tuple[float, int]]], state).values())
        if len(by_rank) == ranks.size:
            own = by_rank[ranks.rank : ranks.rank + 1]
        else:
            own = by_rank if ranks.is_first else []
        loaded: dict[str, tuple[float, int]] = {}
        for sums in own:
            for name, (total, count) in sums.items():
                before = loaded.get(name, (0.0, 0))
                loaded[name] = (before[0] + total, before[1] + int(count))
        self._sums = {**loaded}

    def _fetch(self) -> dict[str, tuple[float, int]]:
        """Return all sums as numbers."""
        totals = fetch_floats([total for total, _ in self._sums.values()])
        return {
            name: (total, count)
            for total, (name, (_, count)) in zip(totals, self._sums.items(), strict=True)
        }
