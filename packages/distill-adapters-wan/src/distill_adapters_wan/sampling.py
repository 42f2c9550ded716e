"""From noise to clean latents, by one SamplerSpec."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from distill_protocols import ContractError, SamplerSpec
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, T, H, W], t [B]) -> v [B, C, T, H, W], guidance included."""


def sample(
    velocity: Velocity,
    spec: SamplerSpec,
    noise: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Walk ``spec.sigmas()`` down to 0, in fp32.

    ODE: Euler, ``x <- x + (s' - s) v``. Stochastic: ``x0 = x - s v``, then ``(1 - s') x0 + s' eps``
    with fresh noise (Song et al. 2023, algorithm 1; DMD2, Yin et al. 2024, section 4.4). The order
    of operations is that of diffusers' FlowMatchEulerDiscreteScheduler, so that an exported model
    gives the same clip there.

    Args:
        noise: x at the first sigma [B, C, T, H, W].
        generator: feeds the fresh noise; its device may differ from the latents'.

    Raises:
        ContractError: a stochastic spec of more than one step without a generator.
    """
    if spec.stochastic and spec.steps > 1 and generator is None:
        raise ContractError(
            f"a stochastic sampler of {spec.steps} steps draws noise at each, so it needs a "
            "generator: the global one would make a clip depend on whatever drew before"
        )
    sigmas = torch.tensor([*spec.sigmas(), 0.0], dtype=torch.float32, device=noise.device)
    x = noise.float()
    for sigma, after in itertools.pairwise(sigmas):
        v = velocity(x, (sigma * 1000).expand(x.shape[0])).float()
        if not spec.stochastic:
            x = x + (after - sigma) * v
            continue
        x = x - sigma * v
        if after > 0:  # the last step ends at x0 and draws nothing
            x = (1 - after) * x + after * fresh_noise(x, generator)
    return x


def fresh_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal fp32 of the shape of ``like``, drawn where the generator lives."""
    device = like.device if generator is None else generator.device
    drawn = torch.randn(like.shape, generator=generator, device=device, dtype=torch.float32)
    return drawn.to(like.device)
