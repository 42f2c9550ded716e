"""Stop a run whose loss or gradient is inf or nan, without making an accelerator wait."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from attrs import frozen
from distill_protocols import NonFiniteLossError
from distill_runtime import ALONE, Ranks
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
            "that optimizer. Search for a square root or a division at 0 behind the loss, and "
            "check these samples; then raise the precision of the role.",
        )


class FiniteGuard:
    """Checks every loss and gradient norm: at once on a CPU, on an accelerator later.

    Reading a number from an accelerator makes the host wait for it. So there they are kept
    until ``check``, which the trainer calls at log points, at the end, and, through
    ``RunState.check_finite``, before anything lasting is made of the weights.

    Several processes check together, so that none goes on, or waits, where another has ended. They
    do so only once the gradients are averaged: until then the others of a rank that raised would
    wait for its part of the averages, which never comes.

    Args:
        defer: keep values until ``check``; None: where they are on no CPU.
        ranks: the processes; all call ``watch_gradients`` and ``check`` alike.
    """

    def __init__(self, defer: bool | None = None, *, ranks: Ranks = ALONE) -> None:
        self._defer = defer
        self._ranks = ranks
        self._pending: list[_WatchedValues] = []

    def watch(self, iteration: int, losses: Mapping[str, Tensor], ids: Sequence[str]) -> None:
        """Take in the losses of one micro step, before its backward pass.

        Raises:
            NonFiniteLossError: one is inf or nan (at once on a CPU only).
        """
        watched = _WatchedValues(NonFiniteLossError, iteration, losses, ids)
        if self._ranks.size > 1 or self._is_deferred(losses):
            self._pending.append(watched)
        else:
            watched.raise_if_not_finite()

    def watch_gradients(
        self, iteration: int, norms: Mapping[str, Tensor], ids: Sequence[str]
    ) -> None:
        """Take in the gradients' norms of one iteration, before its optimizers step.

        Args:
            norms: empty where they may be anything (fp16 scaling).

        Raises:
            NonFiniteLossError: one is inf or nan (at once on a CPU only).
            RankError: so it is on another rank.
        """
        self._pending.append(_WatchedValues(NonFiniteGradientError, iteration, norms, ids))
        if not any(self._is_deferred(watched.values) for watched in self._pending):
            self.check()

    def check(self) -> None:
        """Check everything that is kept; one wait for the device.

        Raises:
            NonFiniteLossError: of the first micro step that has such a loss or gradient.
            RankError: so it is on another rank.
        """
        pending, self._pending = self._pending, []
        if not pending:  # so it is on all ranks then
            return
        bad = _first_not_finite(pending)
        if self._ranks.size > 1:
            # Gradients are averaged over ranks: a bad loss of one rank spoils those of all. So a
            # rank reports only its own loss here, and the others name that rank, not themselves.
            own = bad if bad is not None and bad.error is NonFiniteLossError else None
            self._ranks.gather_results(lambda: None if own is None else own.raise_if_not_finite())
        if bad is not None:
            bad.raise_if_not_finite()

    def forget(self, iteration: int) -> None:
        """Drop what is kept of an iteration that was rolled back: it reached no weight."""
        self._pending = [watched for watched in self._pending if watched.iteration != iteration]

    def _is_deferred(self, values: Mapping[str, Tensor]) -> bool:
        if self._defer is not None:
            return self._defer
        return any(value.device.type != "cpu" for value in values.values())


def _first_not_finite(pending: Sequence[_WatchedValues]) -> _WatchedValues | None:
    values = [value for watched in pending for value in watched.values.values()]
    on_device = not all(value.device.type == "cpu" for value in values)
    # From a device one number crosses to the host instead of all of them. Not as float32, where a
    # large float64 would be inf.
    if on_device and torch.stack([torch.isfinite(value) for value in values]).all():
        return None
    return next((watched for watched in pending if not watched.is_finite()), None)


@frozen
class _WatchedValues:
    error: type[NonFiniteLossError]
    iteration: int
    values: Mapping[str, Tensor]
    ids: Sequence[str]

    def is_finite(self) -> bool:
        return all(math.isfinite(value.item()) for value in self.values.values())

    def raise_if_not_finite(self) -> None:
        if not self.is_finite():
            numbers = {name: value.item() for name, value in self.values.items()}
            raise self.error(self.iteration, numbers, self.ids)
