"""Architecture numbers of the published Qwen-Image models, so that a run can be planned offline.

The transformers have the defaults of diffusers' ``QwenImageTransformer2DModel``, which are what
Qwen-Image's ``transformer/config.json`` states; Qwen-Image-2512 is the same model trained on.
"""

from __future__ import annotations

from collections.abc import Mapping

from distill_diffusers.descriptions import LatentInfo, PublishedModel

LATENT_CHANNELS = 16
"""Channels of a latent cell."""
STRIDE_HW = 8
"""Pixels in a latent cell, in height and in width."""
PATCH = 2
"""Latent cells in a token, in height and in width: ``QwenImagePipeline`` packs no other number."""
TEXT_WIDTH = 3584
"""Channels of Qwen2.5-VL 7B."""
MAX_TEXT_TOKENS = 1024
"""Of a prompt, in ``QwenImagePipeline``."""

_MODEL = PublishedModel(
    transformers={"transformer": {"in_channels": LATENT_CHANNELS * PATCH**2, "num_layers": 60}},
    latents=LatentInfo(channels=LATENT_CHANNELS, stride_hw=STRIDE_HW),
)

PUBLISHED: Mapping[str, PublishedModel] = {
    "Qwen/Qwen-Image": _MODEL,
    "Qwen/Qwen-Image-2512": _MODEL,
}
"""Hub id -> numbers."""
