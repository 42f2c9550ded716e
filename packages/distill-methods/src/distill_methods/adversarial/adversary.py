"""A discriminator on features of a model that is there anyway: its turn, and the student's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from distill_protocols import Condition, ModelBundle, RoleError
from torch import Tensor

from distill_methods.adversarial.config import DiscriminatorOptions
from distill_methods.adversarial.losses import (
    accuracy,
    approximate_r1,
    discriminator_loss,
    generator_loss,
    with_gradient,
)
from distill_methods.contracts import LatentDiffusion, discriminators_of
from distill_methods.draws import Draws, Noised
from distill_methods.roles import DISCRIMINATOR


class Judged(NamedTuple):
    """What D says of the student's clips.

    Attributes:
        loss: its derivative reaches the clips and nothing else.
        logits: [B, heads], without history.
    """

    loss: Tensor
    logits: Tensor


class Adversary:
    """The GAN of a method: heads on features of one of its roles (projected GAN, Sauer et al. 2021;
    DMD2, Yin et al. 2024; LADD, Sauer et al. 2024)::

        x_t = (1 - s) x + s eps                     of the student's clips and of the data's
        D   = heads(features(x_t, t, c))            one logit a head, [B, heads]
        L_G = softplus(-D(fake))
        L_D = softplus(D(fake)) + softplus(-D(real)) + w |D(real_t) - D(real_t + sigma n)|^2

    Real and fake clips are noised with one t and one noise a sample (FastGen's Wan run files;
    tianweiy/DMD2 draws anew for each), so that D compares clips and not noises.

    Args:
        name: of the method; its draws are named after it.
        on: the roles that may give features.
        trains_features: whether L_D reaches the weights of the role that does, too.

    Raises:
        RoleError: the role ``discriminator`` is no heads, or is on another role; or the role it is
            on shall be trained and is frozen.
    """

    def __init__(
        self,
        name: str,
        bundle: ModelBundle,
        adapter: LatentDiffusion,
        options: DiscriminatorOptions,
        *,
        draws: Draws,
        on: Sequence[str],
        trains_features: bool = False,
    ) -> None:
        heads = bundle[DISCRIMINATOR].discriminator
        if heads is None or heads.on not in on:
            found = "a model" if heads is None else f"heads on {heads.on!r}"
            raise RoleError(
                f"role {DISCRIMINATOR!r} is {found}; it must be heads on {' or '.join(on)}, whose "
                f"features {name} takes. Set models.{DISCRIMINATOR}.heads.on"
            )
        if trains_features and not bundle[heads.on].trainable:
            raise RoleError(
                f"role {DISCRIMINATOR!r} is on {heads.on!r}, which is frozen, but its loss shall "
                "train the features. Set train_features: false, or put the heads on the critic"
            )
        self.on = heads.on
        """The role whose features D reads."""
        self._name = name
        self._blocks = heads.blocks
        self._bundle = bundle
        self._adapter = adapter
        self._discriminators = discriminators_of(adapter, name)
        self._options = options
        self._draws = draws
        self._trains_features = trains_features

    def judge(
        self, x: Tensor, noised: Noised, cond: Condition, *, trained: Tensor | None = None
    ) -> Judged:
        """The student's turn: L_G of its clips ``x`` [B, C, T, H, W], noised as ``noised`` says.

        The derivative by x is taken at once, so that D and the role it reads can be frozen for
        just as long, and their graph is gone before the student's is walked.

        Args:
            trained: 0 on frames whose derivative is left out, [1, 1, T, 1, 1].
        """
        clips = x.detach().requires_grad_()
        roles = self._bundle
        with torch.enable_grad(), roles[DISCRIMINATOR].frozen(), roles[self.on].frozen():
            x_t = self._adapter.add_noise(clips, noised.noise, noised.t)
            logits = self._logits(x_t, noised.t, cond, through=True)
            loss = generator_loss(logits)
            # Exact, and keeps a derivative of about 1 / numel within what fp16 can say.
            scale = 2.0 ** round(math.log2(x.numel()))
            (gradient,) = torch.autograd.grad(loss * scale, clips)
        gradient = gradient / scale if trained is None else gradient / scale * trained
        return Judged(with_gradient(x, gradient, loss), logits.detach())

    def learn(
        self, real: Tensor, noised: Noised, cond: Condition
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """D's turn: (its loss, its terms, what to say of it).

        Args:
            real: clips of the data for the same conditions, normalised.
            noised: the student's clips, without history, and the noise and t of both.
        """
        t = noised.t
        real_t = self._adapter.add_noise(real, noised.noise, t)
        of_fake = self._learned(noised.x_t, t, cond)
        of_real = self._learned(real_t, t, cond)
        loss = discriminator_loss(of_fake, of_real)
        terms = {"gan_discriminator_loss": loss}
        if self._options.r1_weight > 0:
            push = self._draws.noise_like(real, f"{self._name}.gan.r1")
            moved = self._learned(real_t + self._options.r1_sigma * push, t, cond)
            terms["gan_r1"] = approximate_r1(of_real, moved)
            loss = loss + self._options.r1_weight * terms["gan_r1"]
        with torch.no_grad():
            facts = {
                "gan_accuracy": accuracy(of_fake, of_real),
                "gan_fake_logit": of_fake.mean(),
                "gan_real_logit": of_real.mean(),
            }
        return loss, terms, facts

    def _learned(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self._logits(x_t, t, cond, through=self._trains_features)

    def _logits(self, x_t: Tensor, t: Tensor, cond: Condition, *, through: bool) -> Tensor:
        """``through``: whether their derivative goes through the features."""
        features: dict[int, Tensor | None] = dict.fromkeys(self._blocks)
        with torch.set_grad_enabled(torch.is_grad_enabled() and through):
            self._adapter.forward(self.on, x_t, t, cond, features=features)
        found = {index: value for index, value in features.items() if value is not None}
        return self._discriminators.discriminate(DISCRIMINATOR, found)
