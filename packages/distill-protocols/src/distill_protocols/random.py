"""Named random generators: no draw in this framework comes from the global one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_SHARED = "shared/"


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for ``names`` under ``seed``: stable over processes, platforms and runs."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class RandomStreams:
    """Generators by purpose (``dmd2.score_t``, ``rollout.noise`` ...), made on first use.

    A purpose's numbers depend on (seed, purpose, rank) only: never on which other purposes drew
    first. ``shared=True`` leaves the rank out, for choices that all ranks must make alike; such a
    generator lives on the CPU, as these choices steer control flow and must not wait for a GPU.

    Args:
        seed: the run's seed.
        rank: this process among the data-parallel ones.
        device: where the generators live.
    """

    def __init__(self, seed: int, *, rank: int = 0, device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.rank = rank
        self.device = torch.device(device)
        self._generators: dict[str, torch.Generator] = {}

    def get(self, purpose: str, *, shared: bool = False) -> torch.Generator:
        """The generator of ``purpose``; its state moves on with every draw."""
        key = _SHARED + purpose if shared else purpose
        if key not in self._generators:
            generator = torch.Generator(device="cpu" if shared else self.device)
            rank = "shared" if shared else self.rank
            generator.manual_seed(derive_seed(self.seed, purpose, rank))
            self._generators[key] = generator
        return self._generators[key]

    def state_dict(self) -> dict[str, Tensor]:
        """purpose -> uint8 state, for a checkpoint."""
        return {name: generator.get_state() for name, generator in self._generators.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], *, shared_only: bool = False) -> None:
        """Put every generator back where ``state_dict`` found it; others start afresh.

        Args:
            shared_only: put back only those that all ranks draw from alike: ``state`` is another
                rank's, and this one is new.
        """
        self._generators = {}
        for key, value in state.items():
            purpose = key.removeprefix(_SHARED)
            shared = purpose != key
            if shared or not shared_only:
                self.get(purpose, shared=shared).set_state(value.cpu())
