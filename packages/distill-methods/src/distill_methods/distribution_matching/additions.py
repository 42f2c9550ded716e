"""What ``WholeClipConfig`` adds to distribution matching: an anchor, and a critic that follows."""

from __future__ import annotations

from collections.abc import Sequence

from distill_protocols import Batch, StepResult

from distill_methods.context import MethodContext
from distill_methods.distribution_matching.anchor import DiversityAnchor
from distill_methods.distribution_matching.critic_interpolation import CriticInterpolation
from distill_methods.distribution_matching.whole_clips import WholeClipConfig


class WholeClipAdditions:
    """The diversity anchor and the critic's interpolation, as far as the config asks for them.

    Raises:
        ContractError: as ``DiversityAnchor`` and ``CriticInterpolation``.
    """

    def __init__(self, context: MethodContext, config: WholeClipConfig) -> None:
        self._config = config
        self._anchor = config.anchor and DiversityAnchor(context, config, config.anchor)
        self._interpolation = (
            CriticInterpolation(context, config.critic_interpolation)
            if config.critic_interpolation > 0
            else None
        )

    def add_to_step(self, result: StepResult, batch: Batch, iteration: int) -> StepResult:
        """Add ``anchor_loss`` (the total has it with its weight) to a step's matching, in the
        student's turn."""
        is_students = "student" in self._config.turns(iteration)
        if self._anchor is None or not is_students or not self._anchor.is_trained_in(iteration):
            return result
        turn = self._anchor.student_turn(batch)
        total_loss = result.loss_map["total_loss"] + turn.total_loss
        losses = result.loss_map | turn.losses | {"total_loss": total_loss}
        return StepResult(losses, result.outputs | turn.outputs)

    def after_update(self, stepped: Sequence[str]) -> None:
        """Let the critic follow where ``stepped``, optimizers as ``role.module``, has the
        student."""
        if self._interpolation is not None:
            self._interpolation.after_update(stepped)
