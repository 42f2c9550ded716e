"""Clips for validation, sampled in the same way for every method."""

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
    """Sample and decode each view: clips [B, 3, F, H, W] in [0, 1] by view name, B rows of
    ``cond``.

    Every view starts from the same noise, and two stochastic views re-noise with the same noise:
    row n of the prompts has a generator of its own, which follows from ``seed`` and n alone. It
    is on the CPU, so that a seed means the same clip on every device.

    Args:
        default_spec: of the views that state no sampler.
        rows: the places of the rows of ``cond`` among all prompts; None: 0 .. B - 1.
        poll: called before each sampling step and each decoding (``StopFlag.poll``). Where it
            raises, sampling ends and all weights are as they were.

    Raises:
        RoleError: a view names a role that is not there, or EMA weights that nobody keeps.
        CapabilityError: the adapter cannot decode.
        ConditioningError: a view samples with guidance and there is no negative condition.
    """
    adapter.capabilities.require(["supports_decode"], by="sampling for validation")
    rows = range(len(cond)) if rows is None else rows
    clips = {}
    for view in views:
        spec = view.sampler or default_spec
        # The purpose "look" is part of what a seed means: another name would be another clip.
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
