"""A video that is decoded chunk by chunk, by both kinds of Wan's VAE."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from distill_adapters_wan.causal.decoding import decode_chunks

WAN_2_1: dict[str, Any] = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
WAN_2_2: dict[str, Any] = WAN_2_1 | {
    "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
    "decoder_base_dim": 4, "scale_factor_spatial": 16,
}  # fmt: skip


@pytest.mark.parametrize("config", [WAN_2_1, WAN_2_2], ids=["2.1", "2.2"])
@pytest.mark.parametrize("chunks", [[1, 1, 1, 1, 1], [2, 3], [3, 1, 1]], ids=str)
def test_frames_of_chunks_are_those_of_the_whole_video(config, chunks):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**config).eval()
    latents = 2 * torch.randn(2, 4, sum(chunks), 3, 4)
    with torch.no_grad():
        whole = vae.decode(latents).sample
        parts = list(decode_chunks(vae, latents.split(chunks, dim=2)))
    assert [part.shape[2] for part in parts] == [4 * chunks[0] - 3, *(4 * n for n in chunks[1:])]
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=0, atol=1e-5)
