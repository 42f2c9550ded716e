"""The maths of a discriminator: pure functions, each written once.

Logits are [B, heads], fp32; above 0 a head holds a clip for real, ``D = sigmoid(logit)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import softplus

from distill_methods.adversarial.config import FDivergence


def generator_loss(fake: Tensor) -> Tensor:
    """``mean softplus(-D(fake)) = -mean log D`` (Goodfellow et al. 2014, section 3, the form that
    does not saturate; DMD2, Yin et al. 2024, section 4.3)."""
    return softplus(-fake).mean()


def discriminator_loss(fake: Tensor, real: Tensor) -> Tensor:
    """``mean softplus(D(fake)) + mean softplus(-D(real))`` (Goodfellow et al. 2014, eq. 1); 2 log 2
    where D cannot tell."""
    return softplus(fake).mean() + softplus(-real).mean()


def approximate_r1(real: Tensor, moved: Tensor) -> Tensor:
    """``mean |D(x) - D(x + sigma n)|^2`` (APT, Lin et al. 2025, arXiv:2501.08316): about
    ``sigma^2 |grad D|^2``, R1 without a second derivative."""
    return (real - moved).square().mean()


def accuracy(fake: Tensor, real: Tensor) -> Tensor:
    """Share of (clip, head) that D holds for what they are; half is guessing."""
    return torch.cat([fake < 0, real > 0]).float().mean()


def density_ratio(logits: Tensor, limits: tuple[float, float]) -> Tensor:
    """``r = p_real / p_fake`` at each clip, [B], within ``limits``, without history.

    An optimal D is ``p_real / (p_real + p_fake)``, so its logit is log r (Goodfellow et al. 2014,
    proposition 1); of several heads the mean is taken.
    """
    low, high = limits
    return logits.detach().float().mean(dim=1).exp().clamp(low, high)


_WEIGHTS: Mapping[FDivergence, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda r: r,
    "js": lambda r: 2 * r / (1 + r),
    "softened_reverse_kl": lambda r: 2 / (1 + r),
    "squared_hellinger": torch.sqrt,
    "jeffreys": lambda r: (1 + r) / 2,
    "neyman": lambda r: 1 / r,
}


def divergence_weight(divergence: FDivergence, ratio: Tensor) -> Tensor:
    """``h(r) / h(1)``, ``h(r) = r^2 f''(r)``, of each sample [B] (f-distill, Xu et al. 2025,
    theorem 1 and table 1): what its part of the distribution matching gradient is multiplied by.

    With f such that ``D_f(p || q) = E_q f(p / q)``, p the data, q the student. Over h(1), so that
    where D cannot tell every divergence gives the gradient of the reverse KL, which has h = 1.
    """
    return _WEIGHTS[divergence](ratio)


def with_gradient(x: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
    """A scalar of ``value`` whose derivative by ``x`` is ``gradient``."""
    product = (x * gradient.detach()).sum()
    return value.detach() + (product - product.detach())
