"""How far the weights of trained roles have moved, by a sample of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from distill_protocols import RankGroup, TrainableMethod
from distill_runtime import local_shard
from torch import Tensor

PER_PARAMETER = 16
"""Numbers that are remembered of each parameter, evenly spread over it."""


class WeightMovement:
    """Remembers a sample of the trained weights, and compares it with what they are later.

    Of sharded parameters each rank samples its own shard; what all of them give together is that of
    the whole.
    """

    def __init__(self) -> None:
        self._before: dict[str, Tensor] = {}
        self._updates: dict[str, int] = {}

    def begin(self, method: TrainableMethod) -> None:
        """Remember the weights as they are, unless some are remembered already."""
        if not self._before:
            self._before, self._updates = _sample(method), dict(method.update_counts)

    def measure(self, method: TrainableMethod, ranks: RankGroup) -> dict[str, float]:
        """Return, by ``role.module``, ``|now - before| / |before|`` since the last call; nothing
        of modules without an update since then. All ranks call it alike."""
        now, updates = _sample(method), dict(method.update_counts)
        own = {
            name: (
                float((now[name] - before).double().square().sum()),
                float(before.double().square().sum()),
            )
            for name, before in self._before.items()
            if name in now and updates.get(name, 0) > self._updates.get(name, 0)
        }
        self._before, self._updates = now, updates
        moved: dict[str, float] = {}
        sums = ranks.gather_results(lambda: own)
        for name in own:
            changed, size = (sum(of_rank[name][i] for of_rank in sums) for i in (0, 1))
            if size > 0:
                moved[name] = (changed / size) ** 0.5
        return moved

    def state_dict(self, ranks: RankGroup) -> dict[str, object]:
        """Return what each rank remembers. All ranks call it alike."""
        own = {"weights": self._before, "updates": self._updates}
        by_rank = ranks.gather_results(lambda: own)
        return {f"rank-{rank:05d}": state for rank, state in enumerate(by_rank)}

    def load_state_dict(self, state: Mapping[str, object], ranks: RankGroup) -> None:
        """Restore what ``state_dict`` gave. Another number of ranks has other shards, and begins
        with the weights as they are."""
        by_rank = list(cast(Mapping[str, Mapping[str, Mapping[str, Any]]], state).values())
        if len(by_rank) == ranks.size:
            own = by_rank[ranks.rank]
            self._before, self._updates = dict(own["weights"]), dict(own["updates"])


def _sample(method: TrainableMethod) -> dict[str, Tensor]:
    sample: dict[str, Tensor] = {}
    for name, role in method.bundle.roles.items():
        for key in role.modules if role.trainable else ():
            parts = [
                local_shard(parameter.detach()).flatten()[:: _stride(parameter)]
                for parameter in role.trained_parameters(key).values()
            ]
            if parts:
                # A copy: the slices are views of weights that are about to move.
                sample[f"{name}.{key}"] = torch.cat([part.float() for part in parts]).cpu().clone()
    return sample


def _stride(parameter: Tensor) -> int:
    return max(1, parameter.numel() // PER_PARAMETER)
