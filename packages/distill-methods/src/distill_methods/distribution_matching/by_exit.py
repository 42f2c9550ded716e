"""The two scores of a clip that left the student's sampler at a known step.

A student that is trained at several steps of its sampler makes clips of several distributions: one
call gives softer clips than the last of four. One critic learns the score of their mixture, and
g = f - r then narrows what is wider than the mixture and widens what is narrower, though neither
may differ from the teacher. A critic that is told the step has the score of each.
"""

from __future__ import annotations

from typing import Protocol

import torch
from distill_protocols import (
    Condition,
    ContractError,
    Latents,
    PredType,
    map_latents,
    one_tensor,
)
from torch import Tensor

from distill_methods.context import MethodContext
from distill_methods.contracts import require_contract
from distill_methods.distribution_matching.config import NO_NEGATIVE, MatchingConfig
from distill_methods.rollouts import Rollout
from distill_methods.teachers.ensemble import Teachers


class Critic:
    """The critic's predictions, which is told the exit steps of clips where the config says so.

    Raises:
        ContractError: it was loaded with another number of exit steps, or it shall learn without a
            condition and there is no negative one.
    """

    def __init__(self, context: MethodContext, config: MatchingConfig) -> None:
        self._context = context
        self._spec = config.told_exits
        self._guidance = config.fake_score_guidance_scale
        if config.critic_condition_dropout and context.negative is None:
            reason = NO_NEGATIVE.format(config.critic_condition_dropout)
            raise ContractError(f"critic_condition_dropout: {reason}")
        if self._spec is None:
            return
        self._exits = require_contract(context.adapter.exits, "supports_exits", by=context.name)
        known = self._exits.exit_count("critic")
        if known != self._spec.count:
            raise ContractError(
                f"critic_exits: the critic was loaded with {known} exit steps, and clips leave the "
                f"student's sampler at {self._spec.count}. Load it with the role's need: RoleSpec("
                "exits=config.told_exits)"
            )

    def score(self, x_t: Latents, t: Tensor, cond: Condition, rollout: Rollout) -> Latents:
        """Predict x0, guided as the config says, at x_t, clips of ``rollout`` with noise; t is
        [B]."""
        if self._guidance == 1:
            return self.predict(x_t, t, cond, rollout, "x0")
        return self._context.adapter.forward(
            "critic",
            x_t,
            t,
            cond,
            fwd_pred_type="x0",
            neg_cond=self._context.draw_negative(len(cond)),
            cfg=self._guidance,
        )

    def predict(
        self, x_t: Latents, t: Tensor, cond: Condition, rollout: Rollout, pred_type: PredType
    ) -> Latents:
        """Predict ``pred_type`` at x_t, clips of ``rollout`` with noise; t is [B]."""
        if self._spec is None:
            return self._context.adapter.forward("critic", x_t, t, cond, fwd_pred_type=pred_type)
        # Where all frames of a clip left at one step, one row of the embedding is for all of them.
        exits = rollout.exits if self._spec.by_frame else rollout.exits[:, :1]
        return self._exits.forward_at_exits(
            "critic", one_tensor(x_t), t, cond, exits=exits, fwd_pred_type=pred_type
        )


class ScoreTeachers(Protocol):
    """The teachers in the student's turn: where its clips are led to."""

    @property
    def names(self) -> tuple[str, ...]:
        """Roles of the teachers."""
        ...

    def predict(
        self, x_t: Latents, t: Tensor, cond: Condition, rollout: Rollout, iteration: int
    ) -> Latents:
        """Predict x0 [B, C, T, H, W] at x_t, clips of ``rollout`` with noise; t is [B]."""
        ...


class TeachersByExit:
    """The teachers' guided prediction, with the guidance of the step that each clip left at.

    Raises:
        ContractError: as ``Teachers``.
    """

    def __init__(self, context: MethodContext, config: MatchingConfig) -> None:
        self._teachers = [Teachers(context, at_exit) for at_exit in config.by_exit]

    @property
    def names(self) -> tuple[str, ...]:
        """Roles of the teachers."""
        return self._teachers[0].names

    @torch.no_grad()
    def predict(
        self, x_t: Latents, t: Tensor, cond: Condition, rollout: Rollout, iteration: int
    ) -> Latents:
        """See ``ScoreTeachers.predict``.

        Where clips or frames of the micro batch have different guidances, the teachers are called
        once for each of them, and every frame takes its own.
        """
        # Clean data (CausVid) has the last one's: nothing is learned from it.
        exits = rollout.exits.clamp(max=len(self._teachers) - 1)
        wanted = exits.unique().tolist() if rollout.same_on_all_ranks else None
        total: Latents | None = None
        for step, teachers in enumerate(self._teachers):
            # Of exits that differ between ranks all are called: the ranks of a sharded teacher
            # must make the same calls, or they wait for each other for ever.
            if wanted is not None and step not in wanted:
                continue
            x0 = teachers.predict(x_t, t, cond, pred_type="x0")
            if total is None:
                total = x0
                continue
            is_here = (exits == step)[:, None, :, None, None].to(x0.device)
            total = map_latents(
                lambda own, rest, here=is_here: torch.where(here, own, rest), x0, total
            )
        assert total is not None  # Every rollout has an exit.
        return total
