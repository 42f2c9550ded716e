"""Clips to look at, for every method alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from distill_protocols import (
    Condition,
    ConditioningProvider,
    ModelBundle,
    SamplerSpec,
    SampleView,
)
from torch import Tensor

from distill_methods.contracts import LatentDiffusion


def sample_views(
    adapter: LatentDiffusion,
    bundle: ModelBundle,
    views: Sequence[SampleView],
    cond: Condition,
    *,
    default_spec: SamplerSpec,
    conditioning: ConditioningProvider,
    seed: int,
    poll: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Clips [B, 3, F, H, W] in [0, 1] by view name; B is the number of rows of ``cond``.

    Every view starts from the same noise, and two stochastic views re-noise with the same noise:
    each has a generator of its own, seeded by ``seed``. The generator is a CPU one, so that a
    seed means the same clip on every device.

    ``poll`` is called before each sampling step and each decoding; what it raises ends the look,
    and all weights are as they were (``StopFlag.poll``).

    Raises:
        RoleError: a view names a role that is not there, or EMA weights that nobody keeps.
        CapabilityError: the adapter cannot decode.
        ConditioningError: a view samples with guidance and there is no negative condition.
    """
    adapter.capabilities.require(["supports_decode"], by="sampling for a look")
    clips = {}
    for view in views:
        spec = view.sampler or default_spec
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((len(cond), *adapter.latent_shape), generator=generator)
        role = bundle[view.role]
        device = next(p.device for module in role.modules.values() for p in module.parameters())
        negative = None if spec.guidance == 1 else conditioning.negative().to(device)
        with torch.no_grad(), role.frozen(), role.averaged(ema=view.ema):
            latents = adapter.sample(
                view.role,
                spec,
                noise.to(device),
                cond.to(device),
                neg_cond=negative,
                generator=generator,
                poll=poll,
            )
        poll()
        clips[view.name] = adapter.decode(latents)
    return clips
