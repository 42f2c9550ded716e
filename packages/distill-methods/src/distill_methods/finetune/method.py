"""Finetuning as a training method. The maths is in ``distill_methods.maths``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from distill_protocols import (
    Batch,
    Condition,
    ConditioningProvider,
    DistillMethod,
    ModelBundle,
    RandomStreams,
    SamplerSpec,
    SampleView,
    StepResult,
)
from torch import Tensor
from torch.optim import Optimizer

from distill_methods.contracts import LatentDiffusion
from distill_methods.finetune.config import FinetuneConfig
from distill_methods.maths import bsmntw_weight, noise_like, sample_timesteps, velocity_loss
from distill_methods.sampling import sample_views


class FinetuneMethod(DistillMethod[LatentDiffusion]):
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

    required_roles = ("student",)
    trained_roles = ("student",)

    def __init__(
        self,
        bundle: ModelBundle,
        adapter: LatentDiffusion,
        config: FinetuneConfig,
        *,
        conditioning: ConditioningProvider,
        streams: RandomStreams | None = None,
    ) -> None:
        super().__init__(bundle, adapter, streams=streams)
        self.check_capabilities(config.capabilities)
        self.config = config
        self.conditioning = conditioning
        if config.guided:
            conditioning.negative()

    def get_optimizers(self, iteration: int) -> dict[str, Optimizer]:
        """The student's."""
        return self.optimizers_of(*self.config.turns(iteration))

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """The weighted velocity loss of one micro batch."""
        x0 = self.adapter.normalize_latents(batch.latents)
        t = sample_timesteps(
            len(batch), self.config.time, generator=self.streams.get("finetune.t")
        ).to(x0.device)
        noise = noise_like(x0, self.streams.get("finetune.noise"))
        x_t = self.adapter.add_noise(x0, noise, t)
        velocity = self.adapter.forward("student", x_t, t, batch.cond, fwd_pred_type="v")
        weight = bsmntw_weight(t) if self.config.weighting == "bsmntw" else None
        loss = velocity_loss(velocity, self.adapter.target(x0, noise, t, "v"), weight)
        with torch.no_grad():
            student_x0 = self.adapter.pred_to_x0(velocity, x_t, t)
        return StepResult({"total_loss": loss}, {"student_x0": student_x0})

    @property
    def sampler_spec(self) -> SamplerSpec:
        return self.config.student_sampler

    def batch_ids(self, batch: Batch) -> Sequence[str]:
        return batch.ids

    def sample_for_logging(
        self, views: Sequence[SampleView], cond: Condition, *, seed: int
    ) -> dict[str, Tensor]:
        return sample_views(
            self.adapter,
            self.bundle,
            views,
            cond,
            default_spec=self.sampler_spec,
            conditioning=self.conditioning,
            seed=seed,
        )
