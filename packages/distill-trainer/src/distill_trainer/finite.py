"""Stops a run whose loss or gradient is inf or nan, without making an accelerator wait."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from attrs import frozen
from distill_protocols import NonFiniteLossError
from torch import Tensor


class NonFiniteGradientError(NonFiniteLossError):
    """A gradient is inf or nan behind losses that are finite.

    ``losses`` holds the gradients' total L2 norms, by ``grad_norm/<role.module>``.
    """

    def __init__(
        self, iteration: int, losses: Mapping[str, float], batch_ids: Sequence[str]
    ) -> None:
        super().__init__(iteration, losses, batch_ids)
        norms = ", ".join(f"{name}={value:g}" for name, value in losses.items())
        ids = ", ".join(batch_ids) or "(the method names no ids)"
        self.args = (
            f"iteration {iteration}: a gradient is not finite ({norms}), though every loss is; "
            f"batch: {ids}. Its norm must be finite, because one such step spoils all weights of "
            "that optimizer. Look for a square root or a division at 0 behind the loss, and at "
            "these samples; then raise the precision of the role (models.<role>.precision).",
        )


class FiniteGuard:
    """Looks at every loss and gradient norm: at once on a CPU, on an accelerator later.

    Reading a number from an accelerator makes the host wait for it. So there they are kept
    until ``check``, which the trainer calls at log points, at the end, and, through
    ``RunState.check_finite``, before anything lasting is made of the weights.

    Args:
        defer: keep values until ``check``; None: where they are on no CPU.
    """

    def __init__(self, defer: bool | None = None) -> None:
        self._defer = defer
        self._pending: list[_Watched] = []

    def watch(self, iteration: int, losses: Mapping[str, Tensor], ids: Sequence[str]) -> None:
        """Take in the losses of one micro step, before its backward pass.

        Raises:
            NonFiniteLossError: one is inf or nan (at once on a CPU only).
        """
        self._take(_Watched(NonFiniteLossError, iteration, losses, ids))

    def watch_gradients(
        self, iteration: int, norms: Mapping[str, Tensor], ids: Sequence[str]
    ) -> None:
        """Take in the gradients' norms of one iteration, before its optimizers step.

        Raises:
            NonFiniteGradientError: one is inf or nan (at once on a CPU only).
        """
        self._take(_Watched(NonFiniteGradientError, iteration, norms, ids))

    def check(self) -> None:
        """Look at everything that is kept; one wait for the device.

        Raises:
            NonFiniteLossError: of the first micro step, or its gradient, at fault.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        values = [value for watched in pending for value in watched.values.values()]
        # Not as float32, where a large float64 would be inf.
        if torch.stack([torch.isfinite(value) for value in values]).all():
            return
        for watched in pending:
            watched.raise_if_not_finite()

    def forget(self, iteration: int) -> None:
        """Drop what is kept of an iteration that was taken back: it reached no weight."""
        self._pending = [kept for kept in self._pending if kept.iteration != iteration]

    def _take(self, watched: _Watched) -> None:
        defer = self._defer
        if defer is None:
            defer = any(value.device.type != "cpu" for value in watched.values.values())
        if defer:
            self._pending.append(watched)
        else:
            watched.raise_if_not_finite()


@frozen
class _Watched:
    error: type[NonFiniteLossError]
    iteration: int
    values: Mapping[str, Tensor]
    ids: Sequence[str]

    def raise_if_not_finite(self) -> None:
        numbers = {name: value.item() for name, value in self.values.items()}
        if not all(map(math.isfinite, numbers.values())):
            raise self.error(self.iteration, numbers, self.ids)
