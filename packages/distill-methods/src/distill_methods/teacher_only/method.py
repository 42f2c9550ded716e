"""Teacher-only distillation as a training method. The maths is in ``distill_methods.maths``."""

from __future__ import annotations

import torch
from distill_protocols import (
    Batch,
    StepResult,
)

from distill_methods.latent_method import LatentMethod
from distill_methods.maths import velocity_loss
from distill_methods.teacher_only.config import TeacherOnlyConfig


class TeacherOnlyMethod(LatentMethod[TeacherOnlyConfig]):
    """The student learns the teacher's guided prediction: half the model calls per step.

    Guidance distillation, stage one of Meng et al. 2023 (arXiv:2210.03142)::

        x_t = (1 - s) x0 + s eps,  t = clamp(1000 S_k(u), t_min, t_max), per sample
        L   = mean |v_student(x_t, t, c) - (u + w (c - u))_teacher|^2

    Deviations: w is fixed (theirs is drawn and given to the student as an input), and the loss
    is on v (theirs on x0, weighted). Batches should come without condition dropout: the
    guided prediction at the negative condition is that condition's own.

    ``outputs``: ``student_x0`` and ``teacher_x0``, the clean latents that the predictions imply.

    Args:
        bundle: a trainable student and a frozen teacher.
        conditioning: gives the negative condition, unless nothing is guided.

    Raises:
        RoleError: a role is missing, the teacher is trainable, or the student is not.
        CapabilityError: the adapter lacks something in ``config.capabilities``.
        ConditioningError: something is guided and there is no negative condition.
    """

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """The distance of student and guided teacher in v, on one micro batch."""
        x0 = self.adapter.normalize_latents(batch.latents)
        x_t, _, t = self.draws.noised(
            x0, "teacher_only", iteration, self.config.time, *self.required_roles
        )
        with torch.no_grad():
            target = self.adapter.forward(
                "teacher",
                x_t,
                t,
                batch.cond,
                fwd_pred_type="v",
                neg_cond=self.negative,
                cfg=self.config.guidance_scale,
            )
        velocity = self.adapter.forward("student", x_t, t, batch.cond, fwd_pred_type="v")
        loss = velocity_loss(velocity, target, trained=self.draws.trained_frames(batch.cond))
        with torch.no_grad():
            outputs = {
                "student_x0": self.adapter.pred_to_x0(velocity, x_t, t),
                "teacher_x0": self.adapter.pred_to_x0(target, x_t, t),
            }
        return StepResult({"total_loss": loss}, outputs)
