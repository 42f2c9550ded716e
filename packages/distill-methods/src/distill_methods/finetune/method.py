"""Finetuning as a training method: flow matching on data."""

from __future__ import annotations

import torch
from distill_protocols import Batch, StepResult, main_part, one_tensor

from distill_methods.contracts import chunks_of, loss_mask_of
from distill_methods.finetune.config import FinetuneConfig
from distill_methods.latent_method import LatentMethod
from distill_methods.maths import bsmntw_weight, velocity_loss
from distill_methods.parts import name_parts, sum_part_losses


class FinetuneMethod(LatentMethod[FinetuneConfig]):
    """Flow matching on data (Lipman et al. 2023): only the student, no teacher.

    ::

        x_t = (1 - s) x0 + s eps,  t = clamp(1000 S_k(u), t_min, t_max), per sample
        L   = mean w(t) |v_student(x_t, t, c) - (eps - x0)|^2

    If the student is causal, t may be drawn per chunk (diffusion forcing, Chen et al. 2024,
    arXiv:2407.01392; w is then that of each chunk's t), and chunks may see clean data before them
    (teacher forcing).

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

    name = "finetune"

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """Compute the weighted velocity loss of one micro batch."""
        x0 = self.adapter.normalize_latents(batch.clean_latents)
        per_chunk = self.config.times == "per_chunk"
        chunks = chunks_of(self.adapter, "student", main_part(x0).shape[2]) if per_chunk else ()
        x_t, noise, t = self.noise.add_noise_at_random_time(
            x0, "finetune", iteration, self.config.time, "student", chunks=chunks
        )
        past = None  # The noised chunks of the same call.
        if self.config.past == "clean":
            past = self.noise.clean_past(
                one_tensor(x0),
                "finetune.past",
                self.config.student_sampler.context_noise,
                t_max=self.config.past_t_max,
            )
        velocity = self.adapter.forward(
            "student", x_t, t, batch.cond, fwd_pred_type="v", caches=past
        )
        weight = bsmntw_weight(t) if self.config.weighting == "bsmntw" else None
        target = self.adapter.target(x0, noise, t, "v")
        loss, part_losses = sum_part_losses(
            self.adapter,
            "velocity_loss",
            lambda v, v_target, mask: velocity_loss(v, v_target, weight, mask),
            velocity,
            target,
            loss_mask=loss_mask_of(self.adapter, batch),
        )
        with torch.no_grad():
            student_x0 = self.adapter.pred_to_x0(velocity, x_t, t)
        return StepResult({"total_loss": loss}, name_parts("student_x0", student_x0) | part_losses)
