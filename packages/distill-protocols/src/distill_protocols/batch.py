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
from distill_protocols.latents import Latents, LatentShape, main_part, map_latents


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
        """Return the same tensors on ``device``."""
        return Condition({name: value.to(device) for name, value in self.tensors.items()})

    def __getitem__(self, index: slice | Tensor) -> Condition:
        """Rows of every tensor; ``index`` keeps the batch dimension."""
        return Condition({name: value[index] for name, value in self.tensors.items()})

    def expand(self, batch: int) -> Condition:
        """Return a batch of one seen ``batch`` times (no copy); a batch of that size as it is."""
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
        latents: raw (not normalised) clean latents [B, C, T, H, W], fp32, or several parts of them
            (``supports_latent_parts``); None: the data are captions alone, for methods that need no
            more (``MethodConfig.needs_latents``).
        cond: conditions of the B samples, dropout already applied.
        ids: one id a sample, for error messages and logs.
        trajectory: [B, K, C, T, H, W], fp32: what a teacher's sampling of ``latents`` was at K
            noise levels on its way there, normalised, as the model sees it. None unless the
            method asks for it (``MethodPlugin.trajectory_times``, which are those levels).

    Args:
        latent_shape: (C, T, H, W) of the clips that are to be made for captions alone; the same on
            all ranks and in all micro batches of an iteration.
    """

    latents: Latents | None
    cond: Condition
    ids: tuple[str, ...]
    trajectory: Tensor | None = None
    _shape: LatentShape | None = field(default=None, alias="latent_shape")

    def __len__(self) -> int:
        return len(self.ids) if self.latents is None else len(self.latents)

    @property
    def latent_shape(self) -> LatentShape:
        """(C, T, H, W) of the clips of this batch, one of the run's shapes; of several parts that
        of the main one.

        Raises:
            DataError: captions alone, of which nothing says how large their clips are.
        """
        if self.latents is not None:
            _, channels, frames, height, width = main_part(self.latents).shape
            return channels, frames, height, width
        if self._shape is None:
            raise DataError(
                "a batch of captions alone states no shape of clips; give latent_shape, or latents"
            )
        return self._shape

    @property
    def clean_latents(self) -> Latents:
        """``latents`` of a method that needs them.

        Raises:
            DataError: the data are captions alone.
        """
        if self.latents is None:
            raise DataError(
                "the data are captions alone, and this method reads latents. Train on a data set "
                "of clips, or by a method that makes its own"
            )
        return self.latents

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        if self.latents is not None:
            return self.latents.device
        tensors = self.cond.tensors.values()
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch on ``device``."""
        return evolve(
            self,
            latents=None
            if self.latents is None
            else map_latents(lambda latents: latents.to(device), self.latents),
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


@runtime_checkable
class EpochLoader(BatchLoader, Protocol):
    """A ``BatchLoader`` that knows how often it has gone through its data."""

    @property
    def epoch(self) -> float:
        """Passes over the data so far, of all processes together."""
        ...


class ConditioningProvider(Protocol):
    """Conditions that exist before step 1: the negative one, and those of validation prompts."""

    def negative(self) -> Condition:
        """Return the negative (unconditional) condition, batch of one.

        Raises:
            ConditioningError: the run has none.
        """
        ...

    def encode(
        self,
        prompts: Sequence[str],
        images: Tensor | None = None,
        last_images: Tensor | None = None,
    ) -> Condition:
        """Conditions of ``prompts``, encoded once and cached by prompt and encoder.

        Args:
            images: a first frame for each, [B, 3, H_px, W_px] in [0, 1], or several, [B, 3, K,
                H_px, W_px].
            last_images: a last frame for each, [B, 3, H_px, W_px].
        """
        ...


@runtime_checkable
class SeveralNegatives(Protocol):
    """A ``ConditioningProvider`` with more than one negative condition, to be drawn from."""

    def negatives(self) -> Condition:
        """All of them, one row each; the first is ``ConditioningProvider.negative``."""
        ...
