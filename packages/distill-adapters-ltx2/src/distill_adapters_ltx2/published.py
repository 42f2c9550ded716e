"""Architecture numbers of the published LTX-2 models, so that a run can be planned offline.

- LTX-2: the defaults of ``LTX2VideoTransformer3DModel``, which are those of
  ``get_ltx2_transformer_config`` in diffusers' ``scripts/convert_ltx2_to_diffusers.py``.
- LTX-2.3: what that script sets otherwise: gated attention, text modulated by the time, and no
  projection of the text, which the connectors have made for each part.
- Hub ids: those of diffusers' pages on LTX-2.
"""

from __future__ import annotations

from collections.abc import Mapping

from distill_diffusers.descriptions import LatentInfo, PublishedModel

LATENT_CHANNELS = 128
"""Channels of a latent cell of the pictures."""
STRIDE_T = 8
"""Frames in a latent frame; the first latent frame is one frame."""
STRIDE_HW = 32
"""Pixels in a latent cell, in height and in width."""
SOUND_CHANNELS = 8
"""Of a latent frame of the sound, which has 16 frequency bins: 128 numbers, one token."""
TEXT_WIDTH = 3840
"""Of Gemma 3 12B, and of the connectors of LTX-2."""

_LATENTS = LatentInfo(channels=LATENT_CHANNELS, stride_t=STRIDE_T, stride_hw=STRIDE_HW)

_LTX2: Mapping[str, object] = {"num_layers": 48, "rope_type": "split"}
_LTX23: Mapping[str, object] = {
    **_LTX2,
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}


def _published(transformer: Mapping[str, object]) -> PublishedModel:
    return PublishedModel(transformers={"transformer": transformer}, latents=_LATENTS)


PUBLISHED: Mapping[str, PublishedModel] = {
    "Lightricks/LTX-2": _published(_LTX2),
    "diffusers/LTX-2.3-Diffusers": _published(_LTX23),
    "diffusers/LTX-2.3-Distilled-Diffusers": _published(_LTX23),
}
"""Hub id -> numbers."""
