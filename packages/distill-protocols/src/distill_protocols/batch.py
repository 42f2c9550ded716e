"""What a data loader yields and what a model is conditioned on.

Letters: B batch, C channels, T latent frames, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from distill_protocols.errors import DataError


def _copied(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return dict(tensors)


@frozen(eq=False)
class Condition:
    """Conditioning tensors by name, each with the batch first: ``{"text": [B, L, D]}``.

    Which names there are is the adapter's business; image-to-video adds names, not classes.
    """

    tensors: Mapping[str, Tensor] = field(converter=_copied)

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0] if self.tensors else 0

    def to(self, device: torch.device | str) -> Condition:
        """The same tensors on ``device``."""
        return Condition({name: value.to(device) for name, value in self.tensors.items()})

    def __getitem__(self, index: slice | Tensor) -> Condition:
        """Rows of every tensor; ``index`` keeps the batch dimension."""
        return Condition({name: value[index] for name, value in self.tensors.items()})

    def expand(self, batch: int) -> Condition:
        """A batch of one seen ``batch`` times (no copy); a batch of that size as it is."""
        if len(self) == batch:
            return self
        if len(self) != 1:
            raise DataError(
                f"a condition of {len(self)} rows cannot be expanded to {batch}: only one row can"
            )
        return Condition({k: v.expand(batch, *v.shape[1:]) for k, v in self.tensors.items()})

    def merged_onto(self, below: Condition) -> Condition:
        """These tensors, and those of ``below`` under names that are not here.

        A negative condition states what replaces what: one of text alone leaves a picture as it is.
        """
        return Condition({**below.tensors, **self.tensors})

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Rows of all parts after each other. All must hold the same names."""
        names = [set(part.tensors) for part in parts]
        if any(n != names[0] for n in names):
            raise DataError(
                f"conditions with different tensors cannot be joined: {[sorted(n) for n in names]}"
            )
        return Condition({k: torch.cat([p.tensors[k] for p in parts]) for k in parts[0].tensors})


@frozen(eq=False, kw_only=True)
class Batch:
    """One micro batch.

    Attributes:
        latents: raw (not normalised) clean latents [B, C, T, H, W], fp32.
        cond: conditions of the B samples, dropout already applied.
        ids: one id a sample, for error messages and logs.
        trajectory: [B, K, C, T, H, W], fp32: what a teacher's sampling of ``latents`` was at K
            noise levels on its way there, normalised, as the model sees it. None unless the
            method asks for it (``MethodPlugin.trajectory_times``, which are those levels).
    """

    latents: Tensor
    cond: Condition
    ids: tuple[str, ...]
    trajectory: Tensor | None = None

    def __len__(self) -> int:
        return self.latents.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        return evolve(
            self,
            latents=self.latents.to(device),
            cond=self.cond.to(device),
            trajectory=None if self.trajectory is None else self.trajectory.to(device),
        )


@runtime_checkable
class BatchLoader(Protocol):
    """An endless stream of batches whose position can be saved."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, object]:
        """JSON-able position: the number of batches given out, seed, ..."""
        ...

    def load_state_dict(self, state: Mapping[str, object]) -> None: ...


class ConditioningProvider(Protocol):
    """Conditions that exist before step 1: the negative one, and those of validation prompts."""

    def negative(self) -> Condition:
        """The negative (unconditional) condition, batch of one.

        Raises:
            ConditioningError: the run has none.
        """
        ...

    def encode(self, prompts: Sequence[str], images: Tensor | None = None) -> Condition:
        """Conditions of ``prompts``, encoded once and cached by prompt and encoder.

        Args:
            images: a first frame for each, [B, 3, H_px, W_px] in [0, 1].
        """
        ...
