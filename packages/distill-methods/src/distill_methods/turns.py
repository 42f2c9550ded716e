"""The turns of an iteration: what each role that steps adds to it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from distill_protocols import StepResult
from torch import Tensor


class TurnResult(NamedTuple):
    """The part of a step that one role's turn adds: to the total loss, its single losses without
    their weights, and outputs for logs."""

    total_loss: Tensor
    losses: dict[str, Tensor]
    outputs: dict[str, Tensor]


def add_turns(*turns: TurnResult) -> StepResult:
    """Combine the turns of an iteration: losses are added, later outputs replace earlier ones."""
    losses: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for turn in turns:
        losses.update(turn.losses)
        outputs.update(turn.outputs)
    total_loss = torch.stack([turn.total_loss for turn in turns]).sum()
    return StepResult({"total_loss": total_loss, **losses}, outputs)
