"""Named random generators: no draw in this framework comes from the global one."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

_SHARED = "shared/"
_ROWS = "rows/"


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed for ``names`` under ``seed``: stable over processes, platforms and
    runs."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class RowGenerators:
    """One generator a row of a batch: what a row draws does not depend on its neighbours.

    So a sample gets the same noise whatever the batch, the accumulation or the process that it
    falls to. All draws are fp32 on the generators' device, or int64.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = tuple(generators)

    @classmethod
    def seeded(
        cls, seed: int, purpose: str, rows: Iterable[int], device: torch.device | str = "cpu"
    ) -> RowGenerators:
        """Row n of ``purpose`` under ``seed`` is a function of the three alone."""
        return cls(
            [torch.Generator(device).manual_seed(derive_seed(seed, purpose, n)) for n in rows]
        )

    @classmethod
    def of_clips(cls, seed: int, clips: Iterable[int]) -> RowGenerators:
        """Clip n draws what a stock pipeline draws after ``torch.manual_seed(seed + n)``: on the
        CPU, so that a seed means the same clip on every device."""
        return cls([torch.Generator().manual_seed(seed + clip) for clip in clips])

    def __len__(self) -> int:
        return len(self._generators)

    def normal(self, shape: Sequence[int] = ()) -> Tensor:
        """Standard normal [B, *shape]."""
        return self._drawn(torch.randn, shape)

    def uniform(self, shape: Sequence[int] = ()) -> Tensor:
        """Uniform in [0, 1), [B, *shape]."""
        return self._drawn(torch.rand, shape)

    def integers(self, high: int, shape: Sequence[int] = ()) -> Tensor:
        """Uniform in 0 .. high - 1, [B, *shape]."""
        size = tuple(shape)
        return torch.stack(
            [torch.randint(high, size, generator=g, device=g.device) for g in self._generators]
        )

    def _drawn(self, draw: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        size = tuple(shape)
        return torch.stack(
            [
                draw(size, generator=g, device=g.device, dtype=torch.float32)
                for g in self._generators
            ]
        )


class RandomStreams:
    """Generators by purpose (``dmd2.student.t``, ``dmd2.student.noise`` ...), made on first use.

    ``rows`` is for what is drawn once a sample: noise, t. The numbers depend on (seed, purpose,
    the sample's place in the run) only: never on the batch size, the accumulation, or how many
    processes there are, of which each takes the samples that ``LatentLoader`` gives it.

    ``get`` is for everything else. Its numbers depend on (seed, purpose, rank). ``shared=True``
    leaves the rank out, for choices that all ranks must make alike; such a generator lives on the
    CPU, as these choices steer control flow and must not wait for a GPU.

    Args:
        seed: the run's seed.
        rank, world_size: this process among the data-parallel ones.
        device: where the generators live.
    """

    def __init__(
        self,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)
        self._generators: dict[str, torch.Generator] = {}
        self._rows: dict[str, int] = {}

    def get(self, purpose: str, *, shared: bool = False) -> torch.Generator:
        """Return the generator of ``purpose``; its state moves on with every draw."""
        key = _SHARED + purpose if shared else purpose
        if key not in self._generators:
            generator = torch.Generator(device="cpu" if shared else self.device)
            rank = "shared" if shared else self.rank
            generator.manual_seed(derive_seed(self.seed, purpose, rank))
            self._generators[key] = generator
        return self._generators[key]

    def rows(self, purpose: str, count: int) -> RowGenerators:
        """Return generators of the next ``count`` samples of this process, one each.

        All processes ask alike: together they take the next ``count * world_size`` rows of
        ``purpose``, this one every ``world_size``-th, beginning with its rank.
        """
        first = self._rows.get(purpose, 0)
        after = first + count * self.world_size
        self._rows[purpose] = after
        mine = range(first + self.rank, after, self.world_size)
        return RowGenerators.seeded(self.seed, purpose, mine, self.device)

    @contextlib.contextmanager
    def replaced(self, seed: int) -> Iterator[None]:
        """Within: the streams of another seed, at their beginning, for whoever holds this object;
        after: these again, as they were, also where the block raises."""
        own = self.seed, self._generators, self._rows
        self.seed, self._generators, self._rows = seed, {}, {}
        try:
            yield
        finally:
            self.seed, self._generators, self._rows = own

    def state_dict(self) -> dict[str, Tensor]:
        """purpose -> uint8 state of a generator, or int64 count of rows, for a checkpoint."""
        states = {name: generator.get_state() for name, generator in self._generators.items()}
        counts = {_ROWS + name: torch.tensor(count) for name, count in self._rows.items()}
        return states | counts

    def load_state_dict(self, state: Mapping[str, Tensor], *, shared_only: bool = False) -> None:
        """Put everything back where ``state_dict`` found it; others start afresh.

        Args:
            shared_only: put back only what all ranks have alike (shared generators, counts of
                rows): ``state`` is another rank's, and this one is new.
        """
        self._generators = {}
        self._rows = {}
        for key, value in state.items():
            if key.startswith(_ROWS):
                self._rows[key.removeprefix(_ROWS)] = int(value)
                continue
            purpose = key.removeprefix(_SHARED)
            shared = purpose != key
            if shared or not shared_only:
                self.get(purpose, shared=shared).set_state(value.cpu())
