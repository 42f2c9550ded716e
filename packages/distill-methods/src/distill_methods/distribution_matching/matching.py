"""The two turns of distribution matching: the student's, and its critic's."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from distill_protocols import Batch, Condition, ModelBundle, StepResult
from torch import Tensor

from distill_methods.adversarial.adversary import Adversary
from distill_methods.adversarial.losses import density_ratio, divergence_weight
from distill_methods.contracts import LatentDiffusion
from distill_methods.distribution_matching.config import MatchingConfig
from distill_methods.draws import Draws
from distill_methods.latent_config import LatentMethodConfig
from distill_methods.maths import dmd_gradient, dmd_loss, dmd_normaliser, velocity_loss
from distill_methods.teaching import Teachers
from distill_methods.time_ranges import share_of_levels


class Rollout(NamedTuple):
    """The student's clean latents [B, C, T, H, W] and the (mean) step at which each was taken,
    [B].

    Attributes:
        trained: 0 on frames that stay out of the student's loss, [1, 1, T, 1, 1]; None: those that
            the condition gives, if any.
    """

    x0: Tensor
    exit_steps: Tensor
    trained: Tensor | None = None

    def metrics(self) -> dict[str, Tensor]:
        """What to say of it."""
        x0 = self.x0.detach()
        return {
            "student_x0": x0,
            "student_mean": x0.mean(),
            "student_std": x0.std(),
            "exit_step": self.exit_steps.float().mean(),
        }


class _Turn(NamedTuple):
    """What a turn adds: to the total loss, to the losses and to the outputs that are told."""

    total: Tensor
    losses: dict[str, Tensor]
    outputs: dict[str, Tensor]


class RolloutOf(Protocol):
    """Where the student's clips come from: what the methods differ in."""

    def __call__(self, batch: Batch, turn: str, iteration: int) -> Rollout:
        """With gradient where the caller allows it.

        Args:
            turn: "student" or "critic"; each has draws of its own.
        """
        ...


class DistributionMatching:
    """Distribution matching of whatever clips a method's rollout gives (DMD2, Yin et al. 2024,
    arXiv:2405.14867).

    With frozen teachers and a critic that follows the student::

        x   = a clip of the student
        x_t = (1 - s) x + s eps,  t = clamp(1000 S_k(u), t_min, t_max), per sample
        f   = critic(x_t, c);  r = sum_i a_i (u + w_i (c - u)) of teacher i; as x0, no gradient
        g   = nan_to_num((f - r) / mean |x - r|)            per sample
        L_G = 0.5 mean((x - stop(x - g))^2)                 so that dL_G/dx = g / numel
        L_C = mean |critic_v(x'_t) - (eps' - x')|^2         x' detached, t' and eps' its own

    With ``gan``, a discriminator learns in the critic's turn and judges in the student's
    (``Adversary``), and with ``f_divergence`` g is multiplied by h(r), r from its logits.

    Who learns when is ``MatchingConfig.turns``. In an iteration in which both learn, the two losses
    are added and differentiated at once; they share no graph, as every call that must not learn
    runs without gradient and with its weights frozen.

    ``outputs``: ``student_x0`` of the turn; in the student's turn ``teacher_x0`` and
    ``critic_x0``, the mean normaliser, the gradient's rms, the mean |f - r|; always the mean and
    std of ``student_x0`` and the (mean) exit step; with ``gan`` D's mean logits, its accuracy in
    its turn, and of h its mean and extremes. A nan normaliser means that a prediction was
    not finite and that its samples were left out by nan_to_num.

    Args:
        name: of the method; its draws are named after it.
        negative: one row, where a teacher is guided.
    """

    def __init__(
        self,
        name: str,
        bundle: ModelBundle,
        adapter: LatentDiffusion,
        config: MatchingConfig,
        *,
        draws: Draws,
        negative: Condition | None,
    ) -> None:
        self._name = name
        self._bundle = bundle
        self._adapter = adapter
        self._config = config
        self._draws = draws
        self._teachers = Teachers(adapter, config, draws=draws, negative=negative)
        self._adversary = config.gan and Adversary(
            name,
            bundle,
            adapter,
            config.gan,
            draws=draws,
            on=config.features_of,
            trains_features=config.gan.train_features,
        )

    def step(self, batch: Batch, iteration: int, rollout: RolloutOf) -> StepResult:
        """``dmd_loss`` in the student's turn, ``critic_loss`` in the critic's; with ``gan``
        ``gan_generator_loss`` and ``gan_discriminator_loss`` (and ``gan_r1``) too, without their
        weights; ``total_loss`` is the sum with them."""
        turns = self._config.turns(iteration)
        total: list[Tensor] = []
        losses: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        # The critic first: where both learn, the outputs shown are those of the student's turn.
        if "critic" in turns:
            with self._bundle["student"].frozen():
                found = self._critic_turn(batch, iteration, rollout)
            total.append(found.total)
            losses.update(found.losses)
            outputs.update(found.outputs)
        if "student" in turns:
            with self._bundle["critic"].frozen():
                found = self._student_turn(batch, iteration, rollout)
            total.append(found.total)
            losses.update(found.losses)
            outputs.update(found.outputs)
        return StepResult({"total_loss": torch.stack(total).sum(), **losses}, outputs)

    def _student_turn(self, batch: Batch, iteration: int, rollout: RolloutOf) -> _Turn:
        made = rollout(batch, "student", iteration)
        x, trained = made.x0, made.trained
        if trained is None:
            trained = self._draws.trained_frames(batch.cond)
        with torch.no_grad():
            judges = ("critic", *self._teachers.names)
            noised = self._draws.noised(
                x, f"{self._name}.student", iteration, self._config.score_time, *judges
            )
            x_t, _, t = noised
            fake = self._adapter.forward("critic", x_t, t, batch.cond, fwd_pred_type="x0")
            real = self._teachers.predict(x_t, t, batch.cond, pred_type="x0")
            gradient = dmd_gradient(x, fake, real, trained)
            outputs = made.metrics() | {
                "teacher_x0": real,
                "critic_x0": fake,
                "dmd_normaliser": dmd_normaliser(x, real, trained).mean(),
                "dmd_gradient_rms": gradient.square().mean().sqrt(),
                "score_distance": (fake - real).abs().mean(),
            }
        if self._config.gan is None or self._adversary is None:
            loss = dmd_loss(x, gradient, trained)
            return _Turn(loss, {"dmd_loss": loss}, outputs)
        if self._config.gan.time is not None:
            noised = self._draws.noised(
                x.detach(),
                f"{self._name}.student.gan",
                iteration,
                self._config.gan.time,
                self._adversary.on,
            )
        judged = self._adversary.judge(x, noised, batch.cond, trained=trained)
        gradient, of_ratio = self._weighted(gradient, judged.logits)
        loss = dmd_loss(x, gradient, trained)
        outputs |= {"gan_fake_logit": judged.logits.mean(), **of_ratio}
        return _Turn(
            loss + self._config.gan.generator_weight * judged.loss,
            {"dmd_loss": loss, "gan_generator_loss": judged.loss},
            outputs,
        )

    def _weighted(self, gradient: Tensor, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """g times h(r) of each sample, and what to say of h."""
        if self._config.f_divergence == "reverse_kl":
            return gradient, {}
        ratio = density_ratio(logits, self._config.f_ratio_limits)
        h = divergence_weight(self._config.f_divergence, ratio)
        said = {"f_weight_mean": h.mean(), "f_weight_min": h.min(), "f_weight_max": h.max()}
        return gradient * h.view(-1, *[1] * (gradient.ndim - 1)), said

    def _critic_turn(self, batch: Batch, iteration: int, rollout: RolloutOf) -> _Turn:
        with torch.no_grad():
            made = rollout(batch, "critic", iteration)
            time = self._config.critic_time or self._config.score_time
            x_t, noise, t = self._draws.noised(
                made.x0, f"{self._name}.critic", iteration, time, "critic"
            )
            target = self._adapter.target(made.x0, noise, t, "v")
        velocity = self._adapter.forward("critic", x_t, t, batch.cond, fwd_pred_type="v")
        trained = self._draws.trained_frames(batch.cond)
        loss = velocity_loss(velocity, target, trained=trained)
        if self._config.gan is None or self._adversary is None:
            return _Turn(loss, {"critic_loss": loss}, made.metrics())
        with torch.no_grad():
            seen = self._draws.noised(
                made.x0,
                f"{self._name}.gan",
                iteration,
                self._config.gan_time,
                self._adversary.on,
            )
            real = self._adapter.normalize_latents(batch.latents)
        told, terms, said = self._adversary.learn(real, seen, batch.cond)
        return _Turn(
            loss + self._config.gan.discriminator_weight * told,
            {"critic_loss": loss, **terms},
            made.metrics() | said,
        )


def exit_levels(
    draws: Draws, config: LatentMethodConfig, purpose: str, iteration: int, *, clean: bool = False
) -> tuple[int, ...]:
    """Steps of the student's sampler that it may be taken at: those of one expert an iteration.

    Args:
        clean: t = 0 is one more level, numbered after the last step.
    """
    levels = [1000 * sigma for sigma in config.student_sampler.sigmas()]
    share_of: Callable[[tuple[float, float]], float] = lambda r: share_of_levels(levels, *r)  # noqa: E731
    within = draws.range_of(f"{purpose}.step", iteration, share_of, "student")
    among = [*levels, 0.0] if clean else levels
    return tuple(i for i, t in enumerate(among) if within is None or share_of_levels([t], *within))
