"""Finetuning as a training method. The maths is in ``distill_methods.maths``."""

from __future__ import annotations

import torch
from distill_protocols import (
    Batch,
    StepResult,
)

from distill_methods.finetune.config import FinetuneConfig
from distill_methods.latent_method import LatentMethod
from distill_methods.maths import bsmntw_weight, velocity_loss


class FinetuneMethod(LatentMethod[FinetuneConfig]):
    """Flow matching on data (Lipman et al. 2023): only the student, no teacher.

    ::

        x_t = (1 - s) x0 + s eps,  t = clamp(1000 S_k(u), t_min, t_max), per sample
        L   = mean w(t) |v_student(x_t, t, c) - (eps - x0)|^2

    ``outputs``: ``student_x0``, the clean latents that the prediction implies.

    Args:
        bundle: a trainable student; other roles are not called.
        conditioning: gives the negative condition, where the student is sampled with guidance.

    Raises:
        RoleError: there is no student, or it is frozen.
        CapabilityError: the adapter lacks something in ``config.capabilities``.
        ConditioningError: the student is sampled with guidance and there is no negative
            condition: known now rather than at the first validation.
    """

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """The weighted velocity loss of one micro batch."""
        x0 = self.adapter.normalize_latents(batch.latents)
        x_t, noise, t = self.draws.noised(x0, "finetune", iteration, self.config.time, "student")
        velocity = self.adapter.forward("student", x_t, t, batch.cond, fwd_pred_type="v")
        weight = bsmntw_weight(t) if self.config.weighting == "bsmntw" else None
        target = self.adapter.target(x0, noise, t, "v")
        loss = velocity_loss(velocity, target, weight, self.draws.trained_frames(batch.cond))
        with torch.no_grad():
            student_x0 = self.adapter.pred_to_x0(velocity, x_t, t)
        return StepResult({"total_loss": loss}, {"student_x0": student_x0})
