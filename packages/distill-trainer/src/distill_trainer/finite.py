"""Stops a run whose loss or gradient is inf or nan, without making an accelerator wait."""

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
            "that optimizer. Look for a square root or a division at 0 behind the loss, and at "
            "these samples; then raise the precision of the role (models.<role>.precision).",
        )


class FiniteGuard:
    """Looks at every loss and gradient norm: at once on a CPU, on an accelerator later.

    Reading a number from an accelerator makes the host wait for it. So there they are kept
    until ``check``, which the trainer calls at log points, at the end, and, through
    ``RunState.check_finite``, before anything lasting is made of the weights.

    Several processes look together, so that none goes on, or waits, where another has ended: not
    before the gradients are there, which a bad loss of one spoils on all.

    Args:
        defer: keep values until ``check``; None: where they are on no CPU.
        ranks: the processes; all call ``watch_gradients`` and ``check`` alike.
    """

    def __init__(self, defer: bool | None = None, *, ranks: Ranks = ALONE) -> None:
        self._defer = defer
        self._ranks = ranks
        self._pending: list[_Watched] = []

    def watch(self, iteration: int, losses: Mapping[str, Tensor], ids: Sequence[str]) -> None:
        """Take in the losses of one micro step, before its backward pass.

        Raises:
            NonFiniteLossError: one is inf or nan (at once on a CPU only).
        """
        watched = _Watched(NonFiniteLossError, iteration, losses, ids)
        if self._ranks.size > 1 or self._later(losses):
            self._pending.append(watched)
        else:
            watched.raise_if_not_finite()

    def watch_gradients(
        self, iteration: int, norms: Mapping[str, Tensor], ids: Sequence[str]
    ) -> None:
        """Take in the gradients' norms of one iteration, before its optimizers step.

        Args:
            norms: none where they may be anything (fp16 scaling).

        Raises:
            NonFiniteLossError: one is inf or nan (at once on a CPU only).
            RankError: so it is on another rank.
        """
        self._pending.append(_Watched(NonFiniteGradientError, iteration, norms, ids))
        if not any(self._later(kept.values) for kept in self._pending):
            self.check()

    def check(self) -> None:
        """Look at everything that is kept; one wait for the device.

        Raises:
            NonFiniteLossError: of the first micro step, or its gradient, at problem.
            RankError: so it is on another rank.
        """
        pending, self._pending = self._pending, []
        if not pending:  # so it is on all ranks then
            return
        problem = _first_problem(pending)
        # Gradients are everybody's: where a loss spoilt them, that rank knows better.
        own = problem if problem is not None and problem.error is NonFiniteLossError else None
        self._ranks.gather_results(lambda: None if own is None else own.raise_if_not_finite())
        if problem is not None:
            problem.raise_if_not_finite()

    def forget(self, iteration: int) -> None:
        """Drop what is kept of an iteration that was taken back: it reached no weight."""
        self._pending = [kept for kept in self._pending if kept.iteration != iteration]

    def _later(self, values: Mapping[str, Tensor]) -> bool:
        if self._defer is not None:
            return self._defer
        return any(value.device.type != "cpu" for value in values.values())


def _first_problem(pending: Sequence[_Watched]) -> _Watched | None:
    values = [value for watched in pending for value in watched.values.values()]
    # Not as float32, where a large float64 would be inf.
    if not values or torch.stack([torch.isfinite(value) for value in values]).all():
        return None
    return next(watched for watched in pending if not watched.finite())


@frozen
class _Watched:
    error: type[NonFiniteLossError]
    iteration: int
    values: Mapping[str, Tensor]
    ids: Sequence[str]

    def finite(self) -> bool:
        return all(math.isfinite(value.item()) for value in self.values.values())

    def raise_if_not_finite(self) -> None:
        if not self.finite():
            numbers = {name: value.item() for name, value in self.values.items()}
            raise self.error(self.iteration, numbers, self.ids)
