"""The maths of a discriminator: pure functions, each written once, with paper and equation.

Logits are [B, heads], fp32, and ``D = sigmoid(logit)`` is the probability that a head gives to
"real": above 0 it takes a clip for data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import softplus

from distill_methods.adversarial.config import FDivergence


def generator_loss(logits_fake: Tensor) -> Tensor:
    """Return ``mean softplus(-logit) = -mean log D`` of the student's clips (Goodfellow et al.
    2014, section 3, the form that does not saturate; DMD2, Yin et al. 2024, section 4.3)."""
    return softplus(-logits_fake).mean()


def discriminator_loss(logits_fake: Tensor, logits_real: Tensor) -> Tensor:
    """Return ``mean softplus(logit_fake) + mean softplus(-logit_real)`` (Goodfellow et al. 2014,
    eq. 1); 2 log 2 where D cannot distinguish them."""
    return softplus(logits_fake).mean() + softplus(-logits_real).mean()


def approximate_r1(logits_real: Tensor, logits_perturbed: Tensor) -> Tensor:
    """Return ``mean |D(x) - D(x + sigma n)|^2`` (APT, Lin et al. 2025, arXiv:2501.08316): about
    ``sigma^2 |grad D|^2``, the R1 penalty without a second derivative."""
    return (logits_real - logits_perturbed).square().mean()


def accuracy(logits_fake: Tensor, logits_real: Tensor) -> Tensor:
    """Return the share of (clip, head) pairs that D classifies correctly; half is guessing."""
    return torch.cat([logits_fake < 0, logits_real > 0]).float().mean()


def density_ratio(logits: Tensor, limits: tuple[float, float]) -> Tensor:
    """Return ``r = p_real / p_fake`` at each clip, [B], within ``limits``, without history.

    An optimal D is ``p_real / (p_real + p_fake)``, so its logit is log r (Goodfellow et al. 2014,
    proposition 1); of several heads the mean is taken.
    """
    low, high = limits
    # The limits keep a D that is sure of itself from giving one sample a factor of e^20.
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
    """Return ``h(r) / h(1)``, ``h(r) = r^2 f''(r)``, of each sample, [B]: the factor of its
    distribution matching gradient (f-distill, Xu et al. 2025, theorem 1 and table 1).

    f is such that ``D_f(p || q) = E_q f(p / q)``, p the data, q the student. Divided by h(1), every
    divergence gives the gradient of the reverse KL, which has h = 1, where D cannot distinguish
    data and student: the loss keeps its scale.
    """
    return _WEIGHTS[divergence](ratio)


def attach_gradient(value: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """Return a scalar that is ``value`` and whose derivative by ``x`` is ``gradient``."""
    product = (x * gradient.detach()).sum()
    # product - stop(product) is 0 and keeps the derivative.
    return value.detach() + (product - product.detach())
