"""From noise to clean latents, by one SamplerSpec."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from distill_protocols import ContractError, RowGenerators, SamplerSpec
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, T, H, W], t [B]) -> v [B, C, T, H, W], guidance included."""


def sample(
    velocity: Velocity,
    spec: SamplerSpec,
    noise: Tensor,
    generators: RowGenerators | None = None,
) -> Tensor:
    """Walk ``spec.sigmas()`` down to 0, in fp32.

    ODE: Euler, ``x <- x + (s' - s) v``. Stochastic: ``x0 = x - s v``, then ``(1 - s') x0 + s' eps``
    with fresh noise (Song et al. 2023, algorithm 1; DMD2, Yin et al. 2024, section 4.4). The order
    of operations is that of diffusers' FlowMatchEulerDiscreteScheduler, so that an exported model
    gives the same clip there.

    Args:
        noise: x at the first sigma [B, C, T, H, W].
        generators: feed the fresh noise, one a row; their device may differ from the latents'.

    Raises:
        ContractError: a stochastic spec of more than one step without generators, or with fewer
            or more than rows.
    """
    if spec.stochastic and spec.steps > 1:
        generators = _checked(generators, spec, noise)
    sigmas = torch.tensor([*spec.sigmas(), 0.0], dtype=torch.float32, device=noise.device)
    x = noise.float()
    for sigma, after in itertools.pairwise(sigmas):
        v = velocity(x, (sigma * 1000).expand(x.shape[0])).float()
        if not spec.stochastic:
            x = x + (after - sigma) * v
            continue
        x = x - sigma * v
        if after > 0:  # the last step ends at x0 and draws nothing
            assert generators is not None  # _checked
            fresh = generators.normal(x.shape[1:]).to(x.device)
            x = (1 - after) * x + after * fresh
    return x


def _checked(generators: RowGenerators | None, spec: SamplerSpec, noise: Tensor) -> RowGenerators:
    if generators is None:
        raise ContractError(
            f"a stochastic sampler of {spec.steps} steps draws noise at each, so it needs "
            "generators: the global one would make a clip depend on whatever drew before. Give "
            "RowGenerators, one a row"
        )
    if len(generators) != len(noise):
        raise ContractError(
            f"{len(generators)} generators for {len(noise)} rows of noise; there must be one a "
            "row, so that no clip depends on its neighbours"
        )
    return generators
