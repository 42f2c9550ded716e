"""The tiny denoiser, untrained: `WanTransformer3DModel` with 1.1M parameters."""

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from text import TEXT_DIM
from torch import nn


def build_transformer(seed: int = 0, channels: int = 8) -> WanTransformer3DModel:
    """Fresh weights by Wan's own rule, which diffusers leaves out: Xavier projections, zero biases,
    zero output layer.

    Patches of (1, 2, 2) make 12 tokens of a `[8, 3, 4, 4]` latent; (1, 4, 4) trains faster a step
    and ends worse.
    """
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=384,
        num_layers=4,
        rope_max_seq_len=32,
    )
    for module in transformer.modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer
