"""Architecture numbers of LongCat-Video, so that a run can be planned offline.

Those of ``LongCatVideoTransformer3DModel`` in meituan-longcat/LongCat-Video at commit 6b3f4b8 (the
defaults of the class, which state the 13.6B model), and of Wan 2.1's VAE.
"""

from __future__ import annotations

from collections.abc import Mapping

from distill_diffusers.descriptions import LatentInfo, PublishedModel

LATENT_CHANNELS = 16
FRAME_RATE = 15.0
"""Frames a second of its clips (``run_demo_*.py``); 30 after its refinement, which is not here."""

_TRANSFORMER: Mapping[str, object] = {
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "hidden_size": 4096,
    "depth": 48,
    "num_heads": 32,
    "caption_channels": 4096,
    "mlp_ratio": 4,
    "adaln_tembed_dim": 512,
    "frequency_embedding_size": 256,
    "patch_size": (1, 2, 2),
}

PUBLISHED: Mapping[str, PublishedModel] = {
    "meituan-longcat/LongCat-Video": PublishedModel(
        transformers={"dit": _TRANSFORMER},
        latents=LatentInfo(channels=LATENT_CHANNELS, stride_t=4, stride_hw=8),
    ),
}
"""Hub id -> numbers."""
