"""LADD as a training method: the two losses of a GAN on the teacher's features."""

from __future__ import annotations

from functools import partial

import torch
from distill_protocols import (
    Batch,
    ConditioningProvider,
    ModelBundle,
    RandomStreams,
    StepResult,
    one_tensor,
)

from distill_methods.adversarial.adversary import Adversary
from distill_methods.contracts import LatentDiffusion
from distill_methods.ladd.config import LaddConfig
from distill_methods.latent_method import LatentMethod
from distill_methods.noise_sampler import NoisedLatents
from distill_methods.roles import DISCRIMINATOR
from distill_methods.rollouts import Rollout, StudentRollouts
from distill_methods.turns import TurnResult, run_turns


class LaddMethod(LatentMethod[LaddConfig]):
    """A few-step student that a discriminator on the teacher's features cannot distinguish from
    data (Sauer et al. 2024, arXiv:2403.12015).

    ::

        x = G(x_in, t_k)                x_in noised data, or the student's own sampling from noise
        student's turn:                 softplus(-D(x_t))
        discriminator's turn:           softplus(D(x'_t')) + softplus(-D(data_t')) + r1

    with D and the penalty of ``Adversary``. The student's rollouts are those of DMD2.

    Deviations:

    - The loss is softplus, as in DMD2 and FastGen, and not ADD's hinge.
    - The heads know t and prompt by the teacher's features alone; the paper also gives both to
      them.
    - One head a block gives one logit a clip.
    - "Real" is the data set, which for the paper's setting holds clips that the teacher made.
    - The levels of the student's input are equally likely; the paper begins with high ones.

    ``outputs``: ``student_x0`` of the turn, its mean and std, the (mean) exit step, D's mean
    logits, and in its turn its accuracy.

    Args:
        bundle: a trainable student, a frozen teacher, and a discriminator on the latter.

    Raises:
        RoleError: a role is missing, frozen or trainable where it must not be, or the
            discriminator is not on the teacher.
        CapabilityError: the adapter lacks something in ``config.capabilities``.
    """

    name = "ladd"

    def __init__(
        self,
        bundle: ModelBundle,
        adapter: LatentDiffusion,
        config: LaddConfig,
        *,
        conditioning: ConditioningProvider,
        streams: RandomStreams | None = None,
    ) -> None:
        super().__init__(bundle, adapter, config, conditioning=conditioning, streams=streams)
        self._adversary = Adversary(self.context, config, allowed_on=("teacher",))
        self._rollout = StudentRollouts(self.context, config, config.rollout)

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """Compute ``gan_generator_loss`` in the student's turn, ``gan_discriminator_loss`` (and
        ``gan_r1``) in the discriminator's; ``total_loss`` is their sum, the penalty with its
        weight."""
        roles = self.config.turns(iteration)
        # The discriminator first: where both step, the student's outputs are the ones to log.
        turns = {DISCRIMINATOR: self._discriminator_turn, "student": self._student_turn}
        return run_turns(
            [partial(turn, batch, iteration) for role, turn in turns.items() if role in roles],
            self.context.end_turn,
        )

    def _discriminator_turn(self, batch: Batch, iteration: int) -> TurnResult:
        # No gradient: D is trained on the clips as data, and must not train the student.
        with torch.no_grad(), self.bundle["student"].frozen():
            rollout = self._rollout(batch, DISCRIMINATOR, iteration)
            noised = self._add_noise(rollout, DISCRIMINATOR, iteration)
            real = self.adapter.normalize_latents(one_tensor(batch.clean_latents))
        discriminator = self._adversary.discriminator_loss(real, noised, batch.cond)
        outputs = rollout.outputs() | discriminator.metrics
        return TurnResult(discriminator.loss, discriminator.terms, outputs)

    def _student_turn(self, batch: Batch, iteration: int) -> TurnResult:
        rollout = self._rollout(batch, "student", iteration)
        noised = self._add_noise(rollout, "student", iteration)
        loss, logits_fake = self._adversary.generator_loss(
            one_tensor(rollout.x0), noised, batch.cond
        )
        outputs = rollout.outputs() | {"gan_fake_logit": logits_fake.mean()}
        return TurnResult(loss, {"gan_generator_loss": loss}, outputs)

    def _add_noise(self, rollout: Rollout, turn: str, iteration: int) -> NoisedLatents:
        x0, time = one_tensor(rollout.x0).detach(), self.config.time
        return self.noise.add_noise_at_random_time(
            x0, f"ladd.{turn}", iteration, time, self._adversary.on
        )
