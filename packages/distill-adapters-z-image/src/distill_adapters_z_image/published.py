"""Architecture numbers of the published Z-Image models, so that a run can be planned offline.

The transformers have the defaults of diffusers' ``ZImageTransformer2DModel``, which are what
Z-Image's own ``src/zimage`` builds; Z-Image-Turbo is the few-step student of the same architecture.
"""

from __future__ import annotations

from collections.abc import Mapping

from distill_diffusers.descriptions import LatentInfo, PublishedModel

LATENT_CHANNELS = 16
"""Channels of a latent cell."""
STRIDE_HW = 8
"""Pixels in a latent cell, in height and in width."""
PATCH = 2
"""Latent cells in a token, in height and in width."""
TEXT_WIDTH = 2560
"""Channels of Qwen3 4B."""

_MODEL = PublishedModel(
    transformers={"transformer": {"in_channels": LATENT_CHANNELS, "n_layers": 30}},
    latents=LatentInfo(channels=LATENT_CHANNELS, stride_hw=STRIDE_HW),
)

PUBLISHED: Mapping[str, PublishedModel] = {
    "Tongyi-MAI/Z-Image": _MODEL,
    "Tongyi-MAI/Z-Image-Turbo": _MODEL,
}
"""Hub id -> numbers."""
