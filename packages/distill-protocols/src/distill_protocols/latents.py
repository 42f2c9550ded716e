"""Latents of a clip: one tensor, or several named ones that are sampled together.

Most models have one tensor [B, C, T, H, W]. One that makes sound beside pictures has two, each with
a normalisation, a decoder and a loss of its own, and of shapes that fit in no common tensor.
Methods pass a ``Latents`` on as it is, and compute on it by ``map_latents`` alone, so that
one tensor gives the numbers that it gave before there were parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import torch
from attrs import field, frozen
from torch import Tensor

from distill_protocols.errors import ContractError

LatentShape = tuple[int, int, int, int]
"""(C, T, H, W)."""

PartShapes = Mapping[str, LatentShape]
"""Shapes of all parts of a clip by name, the main part first."""


def _copied(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return dict(tensors)


@frozen(eq=False)
class LatentParts:
    """Latents of B clips as named tensors, each [B, C, T, H, W] of a shape of its own.

    The first one is the main part: its shape is that of the clip, and decides its bucket.

    Raises:
        ContractError: no part, or parts of different numbers of clips.
    """

    tensors: Mapping[str, Tensor] = field(converter=_copied)

    @tensors.validator
    def _check(self, _attribute: object, tensors: Mapping[str, Tensor]) -> None:
        if len({tensor.shape[0] for tensor in tensors.values()}) != 1:
            raise ContractError(
                f"parts of {[tensor.shape[0] for tensor in tensors.values()]} clips; there must be "
                "at least one part, and each must be of the same clips"
            )

    def __len__(self) -> int:
        return self.main.shape[0]

    @property
    def main(self) -> Tensor:
        """The part whose shape is the clip's."""
        return next(iter(self.tensors.values()))

    @property
    def device(self) -> torch.device:
        return self.main.device

    @property
    def shapes(self) -> PartShapes:
        """Shape of one clip's part, by name."""
        return {name: _shape_of(tensor) for name, tensor in self.tensors.items()}


Latents = Tensor | LatentParts
"""Latents of B clips."""

LatentsT = TypeVar("LatentsT", bound=Tensor | LatentParts)
"""What a call is given and gives back: a tensor for a tensor, parts for the same parts."""


def map_latents(function: Callable[..., Tensor], first: LatentsT, *others: Latents) -> LatentsT:
    """Apply ``function`` to tensors, or to the tensors of each part.

    Raises:
        ContractError: latents of different parts.
    """
    if isinstance(first, LatentParts):
        names = list(first.tensors)
        columns = [first.tensors, *(_tensors_of(other, names) for other in others)]
        parts = {name: function(*(column[name] for column in columns)) for name in names}
        return cast(LatentsT, LatentParts(parts))
    if any(isinstance(other, LatentParts) for other in others):
        raise ContractError(
            "a tensor beside latents of several parts; all must have the same parts"
        )
    return cast(LatentsT, function(first, *others))


def _tensors_of(latents: Latents, names: Sequence[str]) -> Mapping[str, Tensor]:
    if not isinstance(latents, LatentParts) or list(latents.tensors) != names:
        found = list(latents.tensors) if isinstance(latents, LatentParts) else "one tensor"
        raise ContractError(
            f"latents of {found} beside parts {names}; all must have the same parts"
        )
    return latents.tensors


def main_part(latents: Latents) -> Tensor:
    """Return the tensor whose shape is the clip's, [B, C, T, H, W]."""
    return latents.main if isinstance(latents, LatentParts) else latents


def one_tensor(latents: Latents) -> Tensor:
    """Return latents that are one tensor.

    Raises:
        ContractError: they are several parts.
    """
    if isinstance(latents, LatentParts):
        raise ContractError(
            f"latents of the parts {', '.join(latents.tensors)}, and one tensor is read here. Use "
            "a method that trains several, or train the main part alone"
        )
    return latents


def flatten_parts(latents: Latents) -> Tensor:
    """Lay the parts of each clip after each other, [B, 1, 1, 1, N]; one tensor stays as it is.

    Whatever is elementwise is computed on such a row as on its parts. ``restore_parts`` inverts it.
    """
    if not isinstance(latents, LatentParts):
        return latents
    rows = torch.cat([tensor.flatten(1) for tensor in latents.tensors.values()], dim=1)
    return rows[:, None, None, None]


def restore_parts(rows: Tensor, like: LatentsT) -> LatentsT:
    """Cut rows of ``flatten_parts`` into parts of the shapes of ``like``."""
    if not isinstance(like, LatentParts):
        return cast(LatentsT, rows)
    return cast(LatentsT, cut_parts(rows, like.shapes))


def cut_parts(rows: Tensor, shapes: PartShapes) -> LatentParts:
    """Cut rows [B, 1, 1, 1, N] into parts of ``shapes``."""
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    pieces = rows.flatten(1).split(sizes, dim=1)
    return LatentParts(
        {
            name: piece.unflatten(1, shape)
            for piece, (name, shape) in zip(pieces, shapes.items(), strict=True)
        }
    )


def _shape_of(tensor: Tensor) -> LatentShape:
    _, channels, frames, height, width = tensor.shape
    return channels, frames, height, width
