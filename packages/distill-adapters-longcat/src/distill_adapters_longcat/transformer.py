"""The transformer of LongCat-Video 13.6B as a module of diffusers: its config, its weights' names.

Written from the technical report (Meituan 2025, arXiv 2510.22200, section 3.1) and held against
meituan-longcat/LongCat-Video at commit 6b3f4b8, ``longcat_video/modules/longcat_video_dit.py``: see
the package's README for how near the two are.

Letters: B batch, C channels, T latent frames, H and W latent height and width, N tokens, D width, L
tokens of the text, A width of the time embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from distill_adapters_longcat.layers import (
    EPS,
    CrossAttention,
    Fp32LayerNorm,
    Fp32Linear,
    KeysAndValues,
    Rotation,
    SelfAttention,
    SwiGLU,
    make_rotation,
)


class PatchEmbedding(nn.Module):
    """Latents [B, C, T, H, W] to tokens [B, N, D]."""

    def __init__(self, patch: Sequence[int], channels: int, width: int) -> None:
        super().__init__()
        kernel = (patch[0], patch[1], patch[2])
        self.proj = nn.Conv3d(channels, width, kernel_size=kernel, stride=kernel)

    def forward(self, latents: Tensor) -> Tensor:
        """Embed patches; the last axis runs fastest."""
        return self.proj(latents).flatten(2).transpose(1, 2)


class TimeEmbedding(nn.Module):
    """Times [B, T] in [0, 1000] to [B, T, A], in fp32."""

    def __init__(self, frequencies: int, width: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(
            Fp32Linear(frequencies, width), nn.SiLU(), Fp32Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Embed each time by cosines and sines, and an MLP."""
        waves = get_timestep_embedding(
            t.float().flatten(), self.frequencies, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return self.mlp(waves).unflatten(0, t.shape)


class TextEmbedding(nn.Module):
    """Embeddings of UMT5 [B, L, channels] to the width of tokens [B, L, D]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.y_proj = nn.Sequential(
            nn.Linear(channels, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )

    def forward(self, text: Tensor) -> Tensor:
        """Project each token."""
        return self.y_proj(text)


class Block(nn.Module):
    """Self-attention, attention to the text, and a SwiGLU, modulated by the time of each frame
    (adaLN, Peebles & Xie 2023) in fp32."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, time_width: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Fp32Linear(time_width, 6 * width))
        self.mod_norm_attn = Fp32LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.mod_norm_ffn = Fp32LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.pre_crs_attn_norm = Fp32LayerNorm(width, eps=EPS)
        self.attn = SelfAttention(width, heads)
        self.cross_attn = CrossAttention(width, heads)
        self.ffn = SwiGLU(width, mlp_ratio * width)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text: Tensor | None,
        text_mask: Tensor | None,
        rotation: Rotation,
        given: int = 0,
        past: KeysAndValues | None = None,
        keep: bool = False,
    ) -> Tensor | tuple[Tensor, KeysAndValues]:
        """Return tokens like ``x`` [B, N, D]; with ``keep`` also their keys and values.

        Args:
            time: embedding of each frame's time [B, T, A].
            text, text_mask: see ``CrossAttention``; without text no token reads any.
            given, past: see ``SelfAttention``; given tokens do not read the text.
        """
        frames, dtype = time.shape[1], x.dtype
        changes = self.adaLN_modulation(time).unsqueeze(2).chunk(6, dim=-1)  # each [B, T, 1, D]
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = changes
        modulated = modulate(x, self.mod_norm_attn, shift_attention, scale_attention)
        attended, own = self.attn(modulated, rotation, given, past)
        # A gate is fp32 and makes the sum so; rounding comes after it.
        x = (x + (gate_attention * attended.unflatten(1, (frames, -1))).flatten(1, 2)).to(dtype)
        if text is not None:
            free = x[:, given:]
            free = free + self.cross_attn(self.pre_crs_attn_norm(free), text, text_mask)
            x = torch.cat([x[:, :given], free], dim=1) if given else free
        mixed = self.ffn(modulate(x, self.mod_norm_ffn, shift_mlp, scale_mlp))
        x = (x + (gate_mlp * mixed.unflatten(1, (frames, -1))).flatten(1, 2)).to(dtype)
        return (x, own) if keep else x


class OutputLayer(nn.Module):
    """Tokens [B, N, D] to patches [B, N, patch channels], modulated by each frame's time, fp32."""

    def __init__(self, width: int, outputs: int, time_width: int) -> None:
        super().__init__()
        self.norm_final = Fp32LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.linear = Fp32Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Fp32Linear(time_width, 2 * width))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Project each token."""
        shift, scale = self.adaLN_modulation(time).unsqueeze(2).chunk(2, dim=-1)
        return self.linear(modulate(x, self.norm_final, shift, scale))


class LongCatVideoTransformer3DModel(ModelMixin, ConfigMixin):
    """Predict ``-v`` of latents [B, C, T, H, W] from UMT5's embeddings.

    Arguments and defaults are those of the original class, so that ``config.json`` is its own both
    ways. What chooses a kernel there (``enable_*``, ``bsa_params``, ``cp_split_hw``) is kept and
    has no effect here.

    Args:
        in_channels, out_channels: of latents.
        hidden_size: D.
        depth: number of blocks.
        num_heads: of attention.
        caption_channels: width of the text's embeddings.
        mlp_ratio: see ``SwiGLU``.
        adaln_tembed_dim: A.
        frequency_embedding_size: cosines and sines that a time is embedded by.
        patch_size: (1, height, width) in latent cells of a token.
        text_tokens_zero_pad: how padding of the text is hidden: True: its projected embeddings are
            0, and attended; False: it is not attended.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = [Block.__name__]  # noqa: RUF012 - ModelMixin's own type
    _no_split_modules = [Block.__name__]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int = 16,
        hidden_size: int = 4096,
        depth: int = 48,
        num_heads: int = 32,
        caption_channels: int = 4096,
        mlp_ratio: int = 4,
        adaln_tembed_dim: int = 512,
        frequency_embedding_size: int = 256,
        patch_size: Sequence[int] = (1, 2, 2),
        enable_flashattn3: bool = False,
        enable_flashattn2: bool = False,
        enable_xformers: bool = False,
        enable_bsa: bool = False,
        bsa_params: Mapping[str, object] | None = None,
        cp_split_hw: Sequence[int] | None = None,
        text_tokens_zero_pad: bool = False,
    ) -> None:
        super().__init__()
        self.patch = (patch_size[0], patch_size[1], patch_size[2])
        self.head_width = hidden_size // num_heads
        self.zero_pad = text_tokens_zero_pad
        self.x_embedder = PatchEmbedding(patch_size, in_channels, hidden_size)
        self.t_embedder = TimeEmbedding(frequency_embedding_size, adaln_tembed_dim)
        self.y_embedder = TextEmbedding(caption_channels, hidden_size)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, mlp_ratio, adaln_tembed_dim) for _ in range(depth)
        )
        cells = self.patch[0] * self.patch[1] * self.patch[2]
        self.final_layer = OutputLayer(hidden_size, cells * out_channels, adaln_tembed_dim)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        given_frames: int = 0,
        past: Sequence[KeysAndValues] | None = None,
        keep: bool = False,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor] | tuple[Tensor, tuple[KeysAndValues, ...]]:
        """Return ``-v`` like ``hidden_states`` [B, C, T, H, W], fp32.

        Frames that are given (a first frame, or those of a clip that is continued) have t = 0, and
        read neither the text nor the frames that are predicted. So they can be part of the clip
        (``given_frames``), or be called alone once, without text (``keep``), and be the ``past`` of
        calls on the others.

        Args:
            timestep: t in [0, 1000], [B] or one a frame [B, T].
            encoder_hidden_states: UMT5's [B, L, channels]; None: no token reads a text.
            encoder_attention_mask: [B, L], other than 0 at tokens of the prompt.
            given_frames: so many frames at the start are given.
            past: by block, the keys and values of the frames before.
            keep: also return, by block, keys and values of these frames. Of a tuple alone.
            return_dict: False: a tuple.
        """
        frames, height, width = hidden_states.shape[2:]
        size = (frames // self.patch[0], height // self.patch[1], width // self.patch[2])
        of_frame = size[1] * size[2]
        if timestep.dim() == 1:
            timestep = timestep[:, None].expand(-1, size[0])
        x, time = self.x_embedder(hidden_states), self.t_embedder(timestep)
        text, mask = self._read_text(encoder_hidden_states, encoder_attention_mask)
        before = 0 if past is None else past[0].keys.shape[2] // of_frame
        rotation = make_rotation(size, self.head_width, x.device, first_frame=before)
        kept: list[KeysAndValues] = []
        for index, block in enumerate(self.blocks):
            own_past = None if past is None else past[index]
            arguments = (x, time, text, mask, rotation, given_frames * of_frame, own_past, keep)
            checkpoint = self._gradient_checkpointing_func
            if torch.is_grad_enabled() and self.gradient_checkpointing and checkpoint is not None:
                output = checkpoint(block, *arguments)
            else:
                output = block(*arguments)
            if keep:
                output, own = output
                kept.append(own)
            x = output
        sample = self._join_patches(self.final_layer(x, time), size)
        if keep:
            return sample, tuple(kept)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _read_text(
        self, text: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Project the text, and hide its padding as the model was trained to."""
        if text is None:
            return None, None
        projected = self.y_embedder(text)
        if mask is None:
            return projected, None
        if self.zero_pad:
            return projected * mask[..., None].to(projected), None
        return projected, (mask != 0)[:, None, None, :]

    def _join_patches(self, tokens: Tensor, size: tuple[int, int, int]) -> Tensor:
        """Bring tokens [B, N, patch channels], channels last, to [B, C, T, H, W]."""
        grid = tokens.unflatten(2, (*self.patch, -1)).unflatten(1, size)
        order = (0, 7, 1, 4, 2, 5, 3, 6)  # B, C, then each axis and its place within a patch
        return grid.permute(order).flatten(6, 7).flatten(4, 5).flatten(2, 3).float()


def modulate(x: Tensor, norm: nn.Module, shift: Tensor, scale: Tensor) -> Tensor:
    """Compute ``norm(x) (1 + scale) + shift`` in fp32; like ``x`` [B, N, D].

    Args:
        shift, scale: of each frame [B, T, 1, D], fp32.
    """
    by_frame = norm(x.float().unflatten(1, (shift.shape[1], -1)))
    return (by_frame * (scale + 1) + shift).flatten(1, 2).type_as(x)
