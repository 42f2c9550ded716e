"""Teacher-only distillation as a training method: regression on guided teachers."""

from __future__ import annotations

import torch
from distill_protocols import (
    Batch,
    ConditioningProvider,
    Latents,
    ModelBundle,
    RandomStreams,
    StepResult,
)

from distill_methods.contracts import LatentDiffusion, chunks_of, loss_mask_of
from distill_methods.latent_method import LatentMethod
from distill_methods.maths import velocity_loss, velocity_weight
from distill_methods.parts import name_parts, sum_part_losses
from distill_methods.teacher_only.config import TeacherOnlyConfig
from distill_methods.teachers.ensemble import Teachers


class TeacherOnlyMethod(LatentMethod[TeacherOnlyConfig]):
    """The student learns the teacher's guided prediction in one call: sampling it takes half the
    model calls.

    Guidance distillation, stage one of Meng et al. 2023 (arXiv:2210.03142)::

        x_t = (1 - s) x + s eps,  t = clamp(1000 S_k(u), t_min, t_max), per sample
        L   = mean a(t) |v_student(x_t, t, c) - sum_i a_i (u + w_i (c - u))_teacher i|^2

    with x from the data or the student's own clip, and a(t) = 1 (``target: v``) or s^2
    (``target: x0``, as x0 = x_t - s v).

    Deviations: w is fixed (theirs is drawn and given to the student as an input), and by default
    the loss is on v (theirs on x0, weighted). Batches should come without condition dropout: for a
    dropped condition, c equals u and the target would not be guided.

    ``outputs``: ``student_x0`` and ``teacher_x0``, the clean latents that the predictions imply.

    Args:
        bundle: a trainable student and the frozen teachers.
        conditioning: gives the negative condition, unless nothing is guided.

    Raises:
        RoleError: a role is missing, a teacher is trainable, or the student is not.
        CapabilityError: the adapter lacks something in ``config.capabilities``.
        ConditioningError: something is guided and there is no negative condition.
        ContractError: a guidance is of a second expert that no teacher has.
    """

    name = "teacher_only"

    def __init__(
        self,
        bundle: ModelBundle,
        adapter: LatentDiffusion,
        config: TeacherOnlyConfig,
        *,
        conditioning: ConditioningProvider,
        streams: RandomStreams | None = None,
    ) -> None:
        super().__init__(bundle, adapter, config, conditioning=conditioning, streams=streams)
        self._teachers = Teachers(self.context, config)

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """Compute the distance of student and guided teachers on one micro batch."""
        x_t, _, t = self.noise.add_noise_at_random_time(
            self._clean_latents(batch),
            "teacher_only",
            iteration,
            self.config.time,
            *self.required_roles,
        )
        target = self._teachers.predict(x_t, t, batch.cond)
        velocity = self.adapter.forward("student", x_t, t, batch.cond, fwd_pred_type="v")
        weight = velocity_weight(t, self.config.target)
        loss, part_losses = sum_part_losses(
            self.adapter,
            "velocity_loss",
            lambda v, v_target, mask: velocity_loss(v, v_target, weight, mask),
            velocity,
            target,
            loss_mask=loss_mask_of(self.adapter, batch),
        )
        with torch.no_grad():
            outputs = {
                **name_parts("student_x0", self.adapter.pred_to_x0(velocity, x_t, t)),
                **name_parts("teacher_x0", self.adapter.pred_to_x0(target, x_t, t)),
                **part_losses,
            }
        return StepResult({"total_loss": loss}, outputs)

    @torch.no_grad()
    def _clean_latents(self, batch: Batch) -> Latents:
        """Return clips of the data, or sample the student's own, [B, C, T, H, W]."""
        if self.config.input == "data":
            return self.adapter.normalize_latents(batch.clean_latents)
        spec = self.config.student_sampler
        with self.bundle["student"].frozen():
            chunks = chunks_of(self.adapter, "student", batch.latent_shape[1])
            return self.adapter.rollout(
                "student",
                spec,
                self.noise.clip_noise(batch, "teacher_only.rollout"),
                batch.cond,
                exit_steps=(spec.steps - 1,) * len(chunks),
                generators=self.streams.rows("teacher_only.rollout.fresh", len(batch)),
                poll=self.stop.poll,
            )
