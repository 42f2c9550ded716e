"""Decoding a video chunk by chunk, with the decoder's past kept in between.

Wan's VAE decodes one latent frame after the other, and each of its causal convolutions keeps the
last frames that it saw (diffusers 0.42 ``AutoencoderKLWan._decode``). There the caches end with the
call; here they last as long as the video.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from torch import Tensor


def decode_chunks(vae: Any, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Decode raw latents [B, C, T, H, W], chunk by chunk, to frames [B, 3, F, H_px, W_px] in
    [-1, 1]: the first latent frame gives one, each further one as many as the VAE folds together.

    Args:
        vae: an ``AutoencoderKLWan``.
    """
    convolutions = sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
    past: list[Any] = [None] * convolutions
    is_first = True
    for chunk in chunks:
        frames = []
        for latent in vae.post_quant_conv(chunk).split(1, dim=2):
            frames.append(vae.decoder(latent, feat_cache=past, feat_idx=[0], first_chunk=is_first))
            is_first = False
        clip = torch.cat(frames, dim=2)
        if vae.config.patch_size is not None:
            clip = unpatchify(clip, patch_size=vae.config.patch_size)
        yield clip.clamp(-1, 1)
