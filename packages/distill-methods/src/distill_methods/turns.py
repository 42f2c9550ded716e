"""The turns of an iteration: what each role that steps adds to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from distill_protocols import EndTurn, StepResult
from torch import Tensor


class TurnResult(NamedTuple):
    """The part of a step that one role's turn adds: to the total loss, its single losses without
    their weights, and outputs for logs."""

    total_loss: Tensor
    losses: dict[str, Tensor]
    outputs: dict[str, Tensor]


def run_turns(turns: Sequence[Callable[[], TurnResult]], end_turn: EndTurn) -> StepResult:
    """Run the turns of an iteration one after the other: losses are added, later outputs replace
    earlier ones.

    Args:
        end_turn: called after each but the last. A trainer differentiates there, so that the graph
            of a turn is gone before the next one begins: no name here may hold on to it.
    """
    total_losses: list[Tensor] = []
    losses: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for number, turn in enumerate(turns, start=1):
        total_loss, own, own_outputs = turn()
        own = {"total_loss": total_loss, **own}
        del total_loss
        if number < len(turns):
            own = end_turn(own)
        total_losses.append(own.pop("total_loss"))
        losses |= own
        outputs |= own_outputs
    return StepResult({"total_loss": torch.stack(total_losses).sum(), **losses}, outputs)
