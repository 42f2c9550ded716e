"""Keys and values of chunks that are past.

What is stored is never written to again: a chunk that is added or dropped makes a new ``Past``.
So activation checkpointing, which keeps one until its backward pass, recomputes what was computed.
"""

from __future__ import annotations

import torch
from attrs import evolve, frozen
from distill_protocols import Chunk, ContractError
from torch import Tensor

from distill_adapters_wan.causal.config import CausalConfig

KeysAndValues = tuple[Tensor, Tensor]
"""K before its rotation and V of one layer, [B, tokens, heads, head width] each, detached."""


@frozen(kw_only=True)
class Place:
    """Which past it is.

    Attributes:
        role: name of the role.
        module: the expert, by its module name.
        negative: of the negative condition.
        stream: see ``ChunkCall``.
    """

    role: str
    module: str
    negative: bool
    stream: str

    def __str__(self) -> str:
        condition = "negative" if self.negative else "positive"
        return f"{self.role}.{self.module}, {condition} condition, stream {self.stream!r}"


@frozen(eq=False)
class StoredChunk:
    """What one chunk stored.

    Attributes:
        x_t, t: what the model was called on.
        layers: of each.
    """

    chunk: Chunk
    x_t: Tensor
    t: Tensor
    layers: tuple[KeysAndValues, ...]


@frozen(eq=False, kw_only=True)
class Caller:
    """What must stay the same from chunk to chunk.

    Attributes:
        shape: batch, height and width of the latents.
        device: theirs.
        tensors: the condition's own tensors, kept alive so that others cannot take their addresses.
        versions: how often each had been written to.
    """

    shape: tuple[int, int, int]
    device: torch.device
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, x_t: Tensor, tensors: tuple[Tensor, ...]) -> Caller:
        batch, _, _, height, width = x_t.shape
        versions = tuple(0 if one.is_inference() else one._version for one in tensors)
        return cls(
            shape=(batch, height, width), device=x_t.device, tensors=tensors, versions=versions
        )

    def differs(self, other: Caller) -> str | None:
        """Describe what is not the same; None if all is."""
        if self.shape != other.shape:
            return f"(batch, height, width) was {self.shape} and is {other.shape}"
        if self.device != other.device:
            return f"the device was {self.device} and is {other.device}"
        if list(map(_identity, self.tensors)) == list(map(_identity, other.tensors)):
            return None if self.versions == other.versions else "the condition was written to"
        # Values are compared (a device sync) only for a condition that was copied.
        if len(self.tensors) != len(other.tensors) or not all(
            map(_is_same, self.tensors, other.tensors)
        ):
            return "the condition is another one"
        return None


@frozen(eq=False, kw_only=True)
class Past:
    """What later chunks attend to.

    Attributes:
        stored: chunks in order, without those that left the window.
        next_frame: where the next chunk begins.
    """

    caller: Caller
    stored: tuple[StoredChunk, ...] = ()
    next_frame: int = 0

    @property
    def frames(self) -> int:
        """How many frames are kept."""
        return sum(s.chunk.frames for s in self.stored)

    @property
    def spans(self) -> tuple[range, ...]:
        """Which frames are kept, chunk by chunk."""
        return tuple(range(s.chunk.first, s.chunk.stop) for s in self.stored)

    def layer(self, index: int) -> list[KeysAndValues]:
        """Return one layer's keys and values, chunk by chunk."""
        return [s.layers[index] for s in self.stored]

    def with_chunk(self, added: StoredChunk, config: CausalConfig) -> Past:
        """Return the past after ``added``, without chunks that no later one attends to."""
        next_frame = added.chunk.stop
        attended = config.past(next_frame)
        kept = (s for s in (*self.stored, added) if any(s.chunk.first in r for r in attended))
        return evolve(self, stored=tuple(kept), next_frame=next_frame)


class KvCaches:
    """The pasts of an adapter, by ``Place``."""

    def __init__(self) -> None:
        self._pasts: dict[Place, Past] = {}

    def past(self, place: Place, chunk: Chunk, caller: Caller, *, after_gap: bool = False) -> Past:
        """Return what ``chunk`` attends to.

        Args:
            after_gap: see ``ChunkCall``.

        Raises:
            ContractError: the past does not end where the chunk begins, or it is that of
                another batch, size or condition.
        """
        past = self._pasts.get(place, Past(caller=caller))
        if after_gap and past.next_frame < chunk.first:
            past = evolve(past, next_frame=chunk.first)
        if past.next_frame != chunk.first:
            raise ContractError(
                f"the chunk begins at frame {chunk.first}, but the past of {place} ends before "
                f"frame {past.next_frame}; chunks follow each other without a gap, because each "
                "attends to all before it. Store each chunk once, in order (ChunkCall.store), and "
                "call clear_caches before the first"
            )
        if difference := past.caller.differs(caller):
            raise ContractError(
                f"the past of {place} belongs to another video: {difference}; a chunk must not "
                "attend to another video's keys. Call clear_caches before a video's first chunk, "
                "or give each video a stream of its own"
            )
        return past

    def stored(self, role: str, stream: str) -> dict[Place, Past]:
        """Return the pasts of one stream of a role, by expert and condition."""
        return {
            place: past
            for place, past in list(self._pasts.items())
            if (place.role, place.stream) == (role, stream)
        }

    def keep(self, place: Place, past: Past) -> None:
        """Store ``past`` in the place of the former one."""
        self._pasts[place] = past

    def clear(self, role: str, stream: str | None = None) -> None:
        """Forget all of a role, or one stream of it."""
        for place in list(self._pasts):  # another thread may be adding its own
            if place.role == role and stream in (None, place.stream):
                self._pasts.pop(place, None)

    def sizes(self) -> dict[Place, int]:
        """Count the bytes of each past."""
        return {
            place: sum(
                t.untyped_storage().nbytes()
                for s in past.stored for pair in s.layers for t in pair
            )
            for place, past in list(self._pasts.items())
        }  # fmt: skip


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.to(one))


def _identity(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
