"""The two losses of distribution matching: the student's, and that of its critic."""

from __future__ import annotations

import torch
from attrs import evolve
from distill_protocols import Batch, StepResult, map_latents, one_tensor
from torch import Tensor

from distill_methods.adversarial.adversary import Adversary
from distill_methods.adversarial.config import GanConfig
from distill_methods.adversarial.losses import density_ratio, divergence_weight
from distill_methods.context import MethodContext
from distill_methods.contracts import loss_mask_of
from distill_methods.distribution_matching.by_exit import (
    Critic,
    ScoreTeachers,
    TeachersByExit,
)
from distill_methods.distribution_matching.config import MatchingConfig
from distill_methods.distribution_matching.noising import ClipNoising, ForwardNoising
from distill_methods.maths import (
    dmd_gradient,
    dmd_loss,
    dmd_normaliser,
    velocity_loss,
    velocity_weight,
)
from distill_methods.parts import map_masked, measure_parts, name_parts, sum_part_losses
from distill_methods.rollouts import RolloutFunction
from distill_methods.turns import TurnResult, run_turns


class DistributionMatching:
    """Distribution matching of whatever clips a method's rollout gives (DMD2, Yin et al. 2024,
    arXiv:2405.14867).

    With frozen teachers and a critic that follows the student::

        x   = a clip of the student
        x_t = (1 - s) x + s eps,  t = 1000 s drawn per sample from ``score_time``
        f   = x0 that the critic predicts at x_t            no gradient
        r   = sum_i a_i (u_i + w_i (c_i - u_i))             x0 of teacher i with guidance, likewise
        g   = nan_to_num((f - r) / mean |x - r|)            per sample
        L_dmd    = 0.5 mean((x - stop(x - g))^2)            so that dL_dmd/dx = g / numel
        L_critic = mean |v_critic(x'_t') - (eps' - x')|^2   x' another clip, t' and eps' its own

    With ``critic_exits`` the critic is told at which step of its sampler the student was left for
    each clip (``by_exit``), in both turns. A discriminator on the critic's features is not: data
    left no sampler, so it would tell the two apart by that.

    The critic is the network of DMD's fake score, not that of a GAN. With ``gan`` there is a
    discriminator beside it: it is trained in the critic's turn and adds its loss to the student's
    (``Adversary``). With ``f_divergence`` g is multiplied by h, a function of the density ratio
    that the discriminator's logits give.

    ``MatchingConfig.turns`` states which roles step when. In an iteration in which student and
    critic step, the two losses are added, and the critic's is differentiated before the student's
    turn begins (``EndingTurns``). They share no graph: a turn calls the other turn's role with its
    weights frozen and in eval mode, or without gradient.

    ``outputs``: ``student_x0`` of the turn, its mean and std, and the (mean) exit step; in the
    student's turn ``teacher_x0`` and ``critic_x0``, the mean normaliser, the rms of g (before h)
    and the mean |f - r|; with ``gan`` D's mean logits, in its turn its accuracy, and mean and
    extremes of h. A nan normaliser means that a prediction was not finite and that nan_to_num left
    its samples out.

    Args:
        rollout: makes the student's clips.
        noising: how they are noised; None: as above.
        teachers: where they are led to; None: as above.
    """

    def __init__(
        self,
        context: MethodContext,
        config: MatchingConfig,
        rollout: RolloutFunction,
        *,
        noising: ClipNoising | None = None,
        teachers: ScoreTeachers | None = None,
    ) -> None:
        self._context = context
        self._config = config
        self._rollout = rollout
        self._noising = noising or ForwardNoising(context)
        self._teachers = teachers or TeachersByExit(context, config)
        self._critic = Critic(context, config)
        self._gan: tuple[GanConfig, Adversary] | None = None
        if config.gan is not None:
            adversary = Adversary(
                context,
                config.gan,
                allowed_on=config.feature_roles,
                trains_features=config.gan.train_features,
            )
            self._gan = config.gan, adversary

    def step(self, batch: Batch, iteration: int) -> StepResult:
        """Compute ``dmd_loss`` in the student's turn and ``critic_loss`` in the critic's; with
        ``gan`` ``gan_generator_loss`` and ``gan_discriminator_loss`` (and ``gan_r1``) too, all of
        them without their weights; ``total_loss`` is the sum with them."""
        bundle, roles = self._context.bundle, self._config.turns(iteration)

        def critic_turn() -> TurnResult:
            with bundle["student"].frozen():
                return self._critic_turn(batch, iteration)

        def student_turn() -> TurnResult:
            with bundle["critic"].frozen():
                return self._student_turn(batch, iteration)

        # The critic first: where both step, the student's outputs are the ones to log. The
        # discriminator has no turn of its own: it is trained in the critic's.
        turns = {"critic": critic_turn, "student": student_turn}
        return run_turns(
            [turn for role, turn in turns.items() if role in roles], self._context.end_turn
        )

    def _student_turn(self, batch: Batch, iteration: int) -> TurnResult:
        context = self._context
        rollout = self._rollout(batch, "student", iteration)
        if rollout.cond is not None:
            batch = evolve(batch, cond=rollout.cond)
        x, loss_mask = rollout.x0, rollout.loss_mask
        if loss_mask is None:
            loss_mask = loss_mask_of(context.adapter, batch)
        # No gradient through noising and the two score models: g is the gradient of the KL by x
        # already (DMD, eq. 7).
        with torch.no_grad():
            noised = self._noising.add_noise(
                rollout,
                f"{context.name}.student",
                iteration,
                self._config.score_time,
                "critic",
                *self._teachers.names,
            )
            x_t, _, t = noised
            critic_x0 = self._critic.score(x_t, t, batch.cond, rollout)
            teacher_x0 = self._teachers.predict(x_t, t, batch.cond, rollout, iteration)
            # Each part by a normaliser of its own: their scales of |x - r| differ.
            gradients = map_masked(dmd_gradient, x, critic_x0, teacher_x0, loss_mask=loss_mask)
            normaliser = map_masked(dmd_normaliser, x, teacher_x0, loss_mask=loss_mask)
            distance = map_latents(torch.sub, critic_x0, teacher_x0)
            outputs = {
                **rollout.outputs(),
                **name_parts("teacher_x0", teacher_x0),
                **name_parts("critic_x0", critic_x0),
                **measure_parts("dmd_normaliser", Tensor.mean, normaliser),
                **measure_parts("dmd_gradient_rms", _mean_rms, gradients),
                **measure_parts("score_distance", lambda d: d.abs().mean(), distance),
            }
        if self._gan is None:
            loss, part_losses = sum_part_losses(
                context.adapter, "dmd_loss", dmd_loss, x, gradients, loss_mask=loss_mask
            )
            return TurnResult(loss, {"dmd_loss": loss}, outputs | part_losses)

        gan, adversary = self._gan
        x, gradient = one_tensor(x), one_tensor(gradients)
        if gan.time is not None:  # Otherwise the discriminator reads the x_t of the scores.
            noised = context.noise.add_noise_at_random_time(
                x.detach(), f"{context.name}.student.gan", iteration, gan.time, adversary.on
            )
        gan_loss = adversary.generator_loss(x, noised, batch.cond, loss_mask=loss_mask)
        outputs["gan_fake_logit"] = gan_loss.logits_fake.mean()
        if self._config.f_divergence != "reverse_kl":  # The reverse KL has h = 1.
            ratio = density_ratio(gan_loss.logits_fake, self._config.f_ratio_limits)
            h = divergence_weight(self._config.f_divergence, ratio)
            gradient = gradient * h.view(-1, *[1] * (gradient.ndim - 1))
            outputs |= {
                "f_weight_mean": h.mean(),
                "f_weight_min": h.min(),
                "f_weight_max": h.max(),
            }
        loss = dmd_loss(x, gradient, loss_mask)
        return TurnResult(
            loss + gan.generator_weight * gan_loss.loss,
            {"dmd_loss": loss, "gan_generator_loss": gan_loss.loss},
            outputs,
        )

    def _critic_turn(self, batch: Batch, iteration: int) -> TurnResult:
        context = self._context
        # No gradient: the critic is trained on the clips as data, and must not train the student.
        with torch.no_grad():
            rollout = self._rollout(batch, "critic", iteration)
            if rollout.cond is not None:
                batch = evolve(batch, cond=rollout.cond)
            time = self._config.critic_time or self._config.score_time
            # Fresh t and noise: one clip has any number of noised versions to learn from.
            noised = self._noising.add_noise(
                rollout, f"{context.name}.critic", iteration, time, "critic"
            )
            target = self._noising.velocity(rollout, noised)
            cond, dropout = batch.cond, self._config.critic_condition_dropout
            if dropout:
                cond = context.drop_condition(cond, dropout, f"{context.name}.critic.dropout")
        # Of the clip's frames; ``rollout.loss_mask`` is of the student's gradient alone.
        velocity = self._critic.predict(noised.x_t, noised.t, cond, rollout, "v")
        weight = velocity_weight(noised.t, self._config.critic_loss)
        loss, part_losses = sum_part_losses(
            context.adapter,
            "critic_loss",
            lambda v, v_target, mask: velocity_loss(v, v_target, weight, mask),
            velocity,
            target,
            loss_mask=loss_mask_of(context.adapter, batch),
        )
        if self._gan is None:
            return TurnResult(loss, {"critic_loss": loss}, rollout.outputs() | part_losses)

        gan, adversary = self._gan
        with torch.no_grad():
            noised_fake = context.noise.add_noise_at_random_time(
                one_tensor(rollout.x0),
                f"{context.name}.gan",
                iteration,
                self._config.gan_time,
                adversary.on,
            )
            real = context.adapter.normalize_latents(one_tensor(batch.clean_latents))
        discriminator = adversary.discriminator_loss(real, noised_fake, batch.cond)
        return TurnResult(
            loss + gan.discriminator_weight * discriminator.loss,
            {"critic_loss": loss, **discriminator.terms},
            rollout.outputs() | discriminator.metrics,
        )


def _mean_rms(gradient: Tensor) -> Tensor:
    """Return the mean over clips of one clip's root mean square."""
    return gradient.square().flatten(1).mean(dim=1).sqrt().mean()
