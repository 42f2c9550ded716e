"""The diversity anchor: the student's first call learns the teacher's way from the same noise."""

from __future__ import annotations

import itertools

import torch
from distill_protocols import Batch, ContractError, Latents, SamplerSpec, map_latents

from distill_methods.context import MethodContext
from distill_methods.contracts import chunks_of, expert_ranges_of, loss_mask_of
from distill_methods.distribution_matching.whole_clips import (
    CAUSAL_ANCHOR,
    NO_STEP_BESIDE_THE_ANCHOR,
    AnchorConfig,
    WholeClipConfig,
)
from distill_methods.maths import velocity_loss
from distill_methods.parts import sum_part_losses
from distill_methods.rollouts import allowed_exit_steps
from distill_methods.teachers.ensemble import Teachers
from distill_methods.turns import TurnResult


class DiversityAnchor:
    """Regression of the student's first velocity on the way that its teacher takes::

        x_0 = eps;  x_{i+1} = x_i + (s_{i+1} - s_i) v_teacher(x_i, s_i)     a guided steps of Euler
        L   = mean |v_student(eps, 1) - (eps - x_a) / (1 - s_a)|^2

    A call at pure noise sees nothing of a clip, and what it gives decides what the clip will be.
    Distribution matching may let it give the same clip for all noise, as long as that is a likely
    one; the anchor ties each noise to the teacher's own clip of it. The loss is that of
    ModelTC/LightX2V@f8aee98b ``lightx2v_train/tricks/diversity.py``, which comes with Phased DMD
    (arXiv:2510.27684); there, too, the matching begins with the second step.

    Raises:
        ContractError: the student is causal, or its expert for the first step is never trained.
    """

    def __init__(
        self, context: MethodContext, config: WholeClipConfig, anchor: AnchorConfig
    ) -> None:
        if len(chunks_of(context.adapter, "student")) > 1:
            raise ContractError(CAUSAL_ANCHOR.format("anchor"))
        if not config.matches_beside_anchor(*expert_ranges_of(context.adapter, "student")[-1]):
            raise ContractError(f"anchor: {NO_STEP_BESIDE_THE_ANCHOR}")
        self._context = context.named(f"{context.name}.anchor")
        self._student_purpose = f"{context.name}.student"
        self._config = config
        self._weight = anchor.weight
        # The guidance of the first step's clips, where it differs by exit step.
        self._teachers = Teachers(self._context, config.by_exit[0])
        spec = SamplerSpec(steps=anchor.teacher_steps, shift=anchor.shift)
        self._sigmas = (*spec.sigmas(), 0.0)[: anchor.anchor_step + 1]

    def is_trained_in(self, iteration: int) -> bool:
        """Return whether ``iteration`` takes the student at steps of the expert that the first step
        goes to: the other one must not step by an anchor that does not train it."""
        exits = allowed_exit_steps(self._context, self._config, self._student_purpose, iteration)
        return 0 in exits.steps

    def student_turn(self, batch: Batch) -> TurnResult:
        """Compute ``anchor_loss`` of one micro batch; the total has its weight."""
        context = self._context
        noise = context.noise.clip_noise(batch, f"{context.name}.noise")
        target = self._teacher_velocity(noise, batch)
        t = torch.full((len(batch),), 1000.0, device=batch.device)
        velocity = context.adapter.forward("student", noise, t, batch.cond, fwd_pred_type="v")
        loss, part_losses = sum_part_losses(
            context.adapter,
            "anchor_loss",
            lambda v, v_target, mask: velocity_loss(v, v_target, loss_mask=mask),
            velocity,
            target,
            loss_mask=loss_mask_of(context.adapter, batch),
        )
        return TurnResult(self._weight * loss, {"anchor_loss": loss}, part_losses)

    @torch.no_grad()
    def _teacher_velocity(self, noise: Latents, batch: Batch) -> Latents:
        """Return the mean velocity of the teacher's way from ``noise``, like it."""
        x = noise
        for sigma, after in itertools.pairwise(self._sigmas):
            self._context.poll()
            t = torch.full((len(batch),), 1000 * sigma, device=batch.device)
            velocity = self._teachers.predict(x, t, batch.cond)
            x = map_latents(lambda x, v, ds=after - sigma: x + ds * v, x, velocity)
        length = 1 - self._sigmas[-1]
        return map_latents(lambda eps, end: (eps - end) / length, noise, x)
