"""LADD as a training method: whose turn it is. The GAN itself is ``adversarial``."""

from __future__ import annotations

import torch
from distill_protocols import Batch, ConditioningProvider, ModelBundle, RandomStreams, StepResult
from torch import Tensor

from distill_methods.adversarial.adversary import Adversary
from distill_methods.contracts import LatentDiffusion
from distill_methods.distribution_matching.matching import Rollout
from distill_methods.draws import Noised
from distill_methods.ladd.config import LaddConfig
from distill_methods.latent_method import LatentMethod
from distill_methods.roles import DISCRIMINATOR
from distill_methods.rollouts import StudentRollouts


class LaddMethod(LatentMethod[LaddConfig]):
    """A few-step student that a discriminator on the teacher's features cannot tell from data
    (Sauer et al. 2024, arXiv:2403.12015).

    ::

        x = G(x_in, t_k)                x_in noised data, or the student's own sampling from noise
        student's turn:                 softplus(-D(x_t))
        discriminator's turn:           softplus(D(x'_t')) + softplus(-D(data_t')) + r1

    with D and the penalty of ``Adversary``. The student's rollouts are those of DMD2.

    Deviations: the loss is the one that DMD2 and FastGen use, not ADD's hinge; heads know t and
    prompt by the teacher's features alone, where the paper gives both to them; one head a block
    gives one logit a clip; "real" is the data set, which for the paper's setting holds clips that
    the teacher made; the levels of the student's input are equally likely (the paper warms up
    with high ones).

    ``outputs``: ``student_x0`` of the turn, its mean and std, the (mean) exit step, D's mean
    logits, and in its turn its accuracy.

    Args:
        bundle: a trainable student, a frozen teacher, and a discriminator on the latter.

    Raises:
        RoleError: a role is missing, frozen or trainable where it must not be, or the
            discriminator is not on the teacher.
        CapabilityError: the adapter lacks something in ``config.capabilities``.
    """

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
        self._adversary = Adversary(
            "ladd", bundle, adapter, config, draws=self.draws, on=("teacher",)
        )
        self._rollout = StudentRollouts(
            "ladd",
            adapter,
            config,
            config.rollout,
            draws=self.draws,
            device=self._device(),
            poll=lambda: self.stop.poll(),
        )

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """``gan_generator_loss`` in the student's turn, ``gan_discriminator_loss`` (and ``gan_r1``)
        in the discriminator's; ``total_loss`` is their sum, the penalty with its weight."""
        turns = self.config.turns(iteration)
        total: list[Tensor] = []
        losses: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        if DISCRIMINATOR in turns:
            with torch.no_grad(), self.bundle["student"].frozen():
                made = self._rollout(batch, DISCRIMINATOR, iteration)
                noised = self._noised(made, DISCRIMINATOR, iteration)
                real = self.adapter.normalize_latents(batch.latents)
            loss, terms, said = self._adversary.learn(real, noised, batch.cond)
            total.append(loss)
            losses.update(terms)
            outputs.update(made.metrics() | said)
        if "student" in turns:
            made = self._rollout(batch, "student", iteration)
            noised = self._noised(made, "student", iteration)
            judged = self._adversary.judge(made.x0, noised, batch.cond)
            total.append(judged.loss)
            losses["gan_generator_loss"] = judged.loss
            outputs.update(made.metrics() | {"gan_fake_logit": judged.logits.mean()})
        return StepResult({"total_loss": torch.stack(total).sum(), **losses}, outputs)

    def _noised(self, made: Rollout, turn: str, iteration: int) -> Noised:
        x, time = made.x0.detach(), self.config.time
        return self.draws.noised(x, f"ladd.{turn}", iteration, time, self._adversary.on)
