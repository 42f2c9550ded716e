"""Clips to look at, for every method alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from distill_protocols import (
    Condition,
    ConditioningProvider,
    ModelBundle,
    RowGenerators,
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
    rows: Sequence[int] | None = None,
    poll: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Clips [B, 3, F, H, W] in [0, 1] by view name; B is the number of rows of ``cond``.

    Every view starts from the same noise, and two stochastic views re-noise with the same noise:
    row n of the prompts has a generator of its own, which follows from ``seed`` and n alone. It
    is a CPU one, so that a seed means the same clip on every device.

    ``poll`` is called before each sampling step and each decoding; what it raises ends the look,
    and all weights are as they were (``StopFlag.poll``).

    Args:
        rows: the places of the rows of ``cond`` among all prompts; None: 0 .. B - 1.

    Raises:
        RoleError: a view names a role that is not there, or EMA weights that nobody keeps.
        CapabilityError: the adapter cannot decode.
        ConditioningError: a view samples with guidance and there is no negative condition.
    """
    adapter.capabilities.require(["supports_decode"], by="sampling for a look")
    rows = range(len(cond)) if rows is None else rows
    clips = {}
    for view in views:
        spec = view.sampler or default_spec
        generators = RowGenerators.seeded(seed, "look", rows)
        noise = generators.normal(adapter.latent_shape)
        role = bundle[view.role]
        device = role.call_device
        negative = conditioning.negative().to(device) if spec.guided else None
        with torch.no_grad(), role.frozen(), role.averaged(ema=view.ema):
            latents = adapter.sample(
                view.role,
                spec,
                noise.to(device),
                cond.to(device),
                neg_cond=negative,
                generators=generators,
                poll=poll,
            )
        poll()
        clips[view.name] = adapter.decode(latents)
    return clips
