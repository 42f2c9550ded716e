"""Stops a run whose loss is inf or nan, without making an accelerator wait in each step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from distill_protocols import NonFiniteLossError
from torch import Tensor


class FiniteGuard:
    """Looks at every loss: at once on a CPU, later and all together on an accelerator.

    Reading a number from an accelerator makes the host wait for it. So there losses are kept
    until ``check``, which the trainer calls at log points, at the end, and, through
    ``RunState.check_finite``, before anything lasting is made of the weights.

    Args:
        defer: keep losses until ``check``; None: where they are on no CPU.
    """

    def __init__(self, defer: bool | None = None) -> None:
        self._defer = defer
        self._pending: list[tuple[int, Mapping[str, Tensor], Sequence[str]]] = []

    def watch(self, iteration: int, losses: Mapping[str, Tensor], ids: Sequence[str]) -> None:
        """Take in the losses of one micro step, before its backward pass.

        Raises:
            NonFiniteLossError: one is inf or nan (at once on a CPU only).
        """
        defer = self._defer
        if defer is None:
            defer = any(loss.device.type != "cpu" for loss in losses.values())
        if defer:
            self._pending.append((iteration, losses, ids))
        elif not all(math.isfinite(loss.item()) for loss in losses.values()):
            raise _error(iteration, losses, ids)

    def check(self) -> None:
        """Look at everything that is kept; one wait for the device.

        Raises:
            NonFiniteLossError: of the first micro step at fault.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        values = torch.stack([loss.float() for _, losses, _ in pending for loss in losses.values()])
        if torch.isfinite(values).all():
            return
        for iteration, losses, ids in pending:
            if not all(math.isfinite(loss.item()) for loss in losses.values()):
                raise _error(iteration, losses, ids)


def _error(iteration: int, losses: Mapping[str, Tensor], ids: Sequence[str]) -> NonFiniteLossError:
    return NonFiniteLossError(iteration, {k: v.item() for k, v in losses.items()}, ids)
