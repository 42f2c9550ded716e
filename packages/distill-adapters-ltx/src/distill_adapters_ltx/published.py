"""Architecture numbers of the published LTX-Video models, so that a run can be planned offline.

- Transformers: ``get_transformer_config`` of diffusers' ``scripts/convert_ltx_to_diffusers.py``
  (0.9.0, 0.9.1 and 0.9.5 alike; 0.9.7), which agree with ``diffusers_config_mapping.py`` of
  Lightricks/LTX-Video and ``model_loader.py`` of Lightricks/LTX-Video-Trainer. A key that is not
  listed has ``LTXVideoTransformer3DModel``'s default, which is the 2B model's.
- Hub ids: those of the last, and of diffusers' page on LTX-Video (0.9.7 distilled, 0.9.8).
- 0.9.6 and the 2B model of 0.9.8 are published as single files only; their transformer is the 2B
  one.
"""

from __future__ import annotations

from collections.abc import Mapping

from distill_diffusers.descriptions import LatentInfo, PublishedModel

LATENT_CHANNELS = 128
"""Channels of a latent cell, in all published VAEs."""
STRIDE_T = 8
"""Frames in a latent frame; the first latent frame is one frame."""
STRIDE_HW = 32
"""Pixels in a latent cell, in height and in width."""

_COMMON: Mapping[str, object] = {
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "patch_size": 1,
    "patch_size_t": 1,
    "num_attention_heads": 32,
    "caption_channels": 4096,
}
# cross_attention_dim is the width (heads x head size) in both: captions are projected to it first.
_2B = {**_COMMON, "attention_head_dim": 64, "cross_attention_dim": 2048, "num_layers": 28}
_13B = {**_COMMON, "attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48}

_LATENTS = LatentInfo(channels=LATENT_CHANNELS, stride_t=STRIDE_T, stride_hw=STRIDE_HW)


def _published(transformer: Mapping[str, object], pipeline: str = "LTXPipeline") -> PublishedModel:
    return PublishedModel(
        transformers={"transformer": transformer},
        latents=_LATENTS,
        call_options={"_class_name": pipeline},
    )


PUBLISHED: Mapping[str, PublishedModel] = {
    "Lightricks/LTX-Video": _published(_2B),
    "Lightricks/LTX-Video-0.9.1": _published(_2B),
    "Lightricks/LTX-Video-0.9.5": _published(_2B),
    "Lightricks/LTX-Video-0.9.7-dev": _published(_13B, "LTXConditionPipeline"),
    "Lightricks/LTX-Video-0.9.7-distilled": _published(_13B, "LTXConditionPipeline"),
    "Lightricks/LTX-Video-0.9.8-13B-distilled": _published(_13B, "LTXConditionPipeline"),
}
"""Hub id -> numbers."""
