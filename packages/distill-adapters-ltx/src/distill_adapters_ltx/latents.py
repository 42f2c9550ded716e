"""Normalisation of latents: from the VAE to the transformer, and back.

Mean and standard deviation are buffers of ``AutoencoderKLLTXVideo`` (``latents_mean`` and
``latents_std`` of its weights file, not of its configuration); the factor is its configuration's
``scaling_factor``, 1 in all published models.

``LTXImageToVideoPipeline`` and ``LTXConditionPipeline`` apply the factor when they decode, but not
when they encode. This matters to no published model.
"""

from __future__ import annotations

from torch import Tensor


def normalize(raw: Tensor, mean: Tensor, std: Tensor, scaling_factor: float = 1.0) -> Tensor:
    """Compute ``(raw - mean) scaling_factor / std``, bit for bit as ``LTXPipeline`` does.

    Args:
        raw: [B, C, T, H, W] as the VAE makes them.
        mean: [C].
        std: [C].
    """
    return (raw - _per_channel(mean, raw)) * scaling_factor / _per_channel(std, raw)


def denormalize(latents: Tensor, mean: Tensor, std: Tensor, scaling_factor: float = 1.0) -> Tensor:
    """Compute ``latents std / scaling_factor + mean``, bit for bit as ``LTXPipeline`` does."""
    return latents * _per_channel(std, latents) / scaling_factor + _per_channel(mean, latents)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).view(1, -1, 1, 1, 1)
