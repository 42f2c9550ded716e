"""Which iterations are the first, since the last check, in which just these modules step."""

from __future__ import annotations

from attrs import define, field
from distill_protocols import TrainableMethod


@define
class Turns:
    """The turns since the last check. They follow from the iteration alone, so a resumed run needs
    no state of them."""

    _seen: set[frozenset[str]] = field(factory=set)
    _until: int = 0
    """The last iteration whose turn is in ``_seen``."""

    def is_new(self, method: TrainableMethod, iteration: int, interval: int) -> bool:
        """Return whether no iteration between the last check and ``iteration`` has its turn.

        Args:
            interval: iterations between two checks.
        """
        first = iteration - (iteration - 1) % interval
        if not first <= self._until < iteration:
            self._seen, self._until = set(), first - 1
        for former in range(self._until + 1, iteration):
            self._seen.add(frozenset(method.get_optimizers(former)))
        self._until = iteration - 1
        return frozenset(method.get_optimizers(iteration)) not in self._seen
