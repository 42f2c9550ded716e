"""A discriminator on features of one of a method's models, and the two losses of its GAN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from distill_protocols import Condition, RoleError, one_tensor
from torch import Tensor

from distill_methods.adversarial.config import DiscriminatorOptions
from distill_methods.adversarial.losses import (
    accuracy,
    approximate_r1,
    attach_gradient,
    discriminator_loss,
    generator_loss,
)
from distill_methods.context import MethodContext
from distill_methods.contracts import require_contract
from distill_methods.noise_sampler import NoisedLatents
from distill_methods.roles import DISCRIMINATOR


class GeneratorLoss(NamedTuple):
    """The student's GAN loss.

    Attributes:
        loss: its derivative reaches the clips and nothing else.
        logits_fake: of the student's clips, [B, heads], without history.
    """

    loss: Tensor
    logits_fake: Tensor


class DiscriminatorLoss(NamedTuple):
    """The discriminator's loss, with the R1 penalty; its terms without their weights; metrics."""

    loss: Tensor
    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]


class Adversary:
    """The GAN of a method: heads on features of one of its roles (projected GAN, Sauer et al. 2021;
    DMD2, Yin et al. 2024; LADD, Sauer et al. 2024)::

        x_t = (1 - s) x + s eps                     of the student's clips and of the data's
        D   = heads(features(x_t, t, c))            one logit a head, [B, heads]
        L_gan = softplus(-D(fake))                   the student's
        L_D   = softplus(D(fake)) + softplus(-D(real)) + w |D(real_t) - D(real_t + sigma n)|^2

    The real and the fake clip of a sample are noised with the same t and noise (FastGen's Wan run
    files; tianweiy/DMD2 draws both for each), so that D compares the clips and not the noises.

    Args:
        allowed_on: the roles that may give features.
        trains_features: whether L_D also reaches the weights of the role that gives them.

    Raises:
        RoleError: the role ``discriminator`` is a model of its own, or is heads on another role;
            or its features shall be trained, and the role that gives them is frozen.
        CapabilityError: the adapter has no discriminators.
    """

    def __init__(
        self,
        context: MethodContext,
        options: DiscriminatorOptions,
        *,
        allowed_on: Sequence[str],
        trains_features: bool = False,
    ) -> None:
        spec = context.bundle[DISCRIMINATOR].discriminator
        if spec is None or spec.on not in allowed_on:
            actual = "a model" if spec is None else f"heads on {spec.on!r}"
            raise RoleError(
                f"role {DISCRIMINATOR!r} is {actual}; it must be heads on "
                f"{' or '.join(allowed_on)}, whose features {context.name} reads. Put the heads on "
                "one of these"
            )
        if trains_features and not context.bundle[spec.on].trainable:
            raise RoleError(
                f"role {DISCRIMINATOR!r} is on {spec.on!r}, which is frozen, but its loss shall "
                "train the features. Use train_features: false, or put the heads on the critic"
            )
        self.on = spec.on
        """The role whose features D reads."""
        self._context = context
        self._blocks = spec.blocks
        self._discriminators = require_contract(
            context.adapter.discriminators, "supports_features", by=context.name
        )
        self._options = options
        self._trains_features = trains_features

    def generator_loss(
        self, x: Tensor, noised: NoisedLatents, cond: Condition, *, loss_mask: Tensor | None = None
    ) -> GeneratorLoss:
        """Return L_gan of the student's clips ``x`` [B, C, T, H, W].

        Args:
            noised: the t and noise to noise ``x`` with.
            loss_mask: 0 on frames whose derivative is left out, [1, 1, T, 1, 1].
        """
        # The derivative by x is taken here and not in the trainer's backward, so that D and the
        # role it reads can be frozen for just as long (their weights must get no gradient from the
        # student's loss), and so that their graph is freed before the student's is walked.
        clips = x.detach().requires_grad_()
        bundle = self._context.bundle
        # enable_grad: the derivative is taken whether or not the caller records one. x_t is made
        # again of the same noise and t, so that it has a derivative by the clip.
        with torch.enable_grad(), bundle[DISCRIMINATOR].frozen(), bundle[self.on].frozen():
            x_t = self._context.adapter.add_noise(clips, one_tensor(noised.noise), noised.t)
            logits = self._call_discriminator(x_t, noised.t, cond, through_features=True)
            loss = generator_loss(logits)
            # The derivative of a mean is about 1 / numel, below what fp16 holds. A power of two
            # scales it up and down again without rounding.
            scale = 2.0 ** round(math.log2(x.numel()))
            (gradient,) = torch.autograd.grad(loss * scale, clips)
        gradient = gradient / scale if loss_mask is None else gradient / scale * loss_mask
        return GeneratorLoss(attach_gradient(loss, x, gradient), logits.detach())

    def discriminator_loss(
        self, real: Tensor, noised_fake: NoisedLatents, cond: Condition
    ) -> DiscriminatorLoss:
        """Return L_D.

        Args:
            real: clips of the data for the same conditions, normalised.
            noised_fake: the student's clips, without history, and the noise and t of both.
        """
        t, through = noised_fake.t, self._trains_features
        fake_t, noise = one_tensor(noised_fake.x_t), one_tensor(noised_fake.noise)
        real_t = self._context.adapter.add_noise(real, noise, t)
        logits_fake = self._call_discriminator(fake_t, t, cond, through_features=through)
        logits_real = self._call_discriminator(real_t, t, cond, through_features=through)
        loss = discriminator_loss(logits_fake, logits_real)
        terms = {"gan_discriminator_loss": loss}
        if self._options.r1_weight > 0:
            # Fresh noise: along the noise that real_t already has, it would only move in t.
            noise = self._context.noise.noise_like(real, f"{self._context.name}.gan.r1")
            perturbed = real_t + self._options.r1_sigma * noise
            logits_perturbed = self._call_discriminator(
                perturbed, t, cond, through_features=through
            )
            terms["gan_r1"] = approximate_r1(logits_real, logits_perturbed)
            loss = loss + self._options.r1_weight * terms["gan_r1"]
        with torch.no_grad():
            metrics = {
                "gan_accuracy": accuracy(logits_fake, logits_real),
                "gan_fake_logit": logits_fake.mean(),
                "gan_real_logit": logits_real.mean(),
            }
        return DiscriminatorLoss(loss, terms, metrics)

    def _call_discriminator(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, through_features: bool
    ) -> Tensor:
        """Return D's logits [B, heads].

        Args:
            through_features: whether their derivative also goes through the role that is read.
        """
        collected: dict[int, Tensor | None] = dict.fromkeys(self._blocks)
        with torch.set_grad_enabled(torch.is_grad_enabled() and through_features):
            self._context.adapter.forward(self.on, x_t, t, cond, features=collected)
        features = {index: value for index, value in collected.items() if value is not None}
        return self._discriminators.discriminate(DISCRIMINATOR, features)
