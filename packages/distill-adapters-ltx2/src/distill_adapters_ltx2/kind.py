"""LTX-2's model class as one value, and what cannot be called as one. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from distill_diffusers.descriptions import LatentInfo
from distill_diffusers.kinds import ModelKind
from distill_diffusers.model_configs import read_integer, read_number

from distill_adapters_ltx2.config import LTX2PipelineConfig
from distill_adapters_ltx2.published import (
    LATENT_CHANNELS,
    SOUND_CHANNELS,
    STRIDE_HW,
    STRIDE_T,
    TEXT_WIDTH,
)

if TYPE_CHECKING:
    from distill_protocols import LatentShape, PartShapes

CONNECTORS, AUDIO_VAE = "connectors", "audio_vae"
"""Folders of what makes the texts of Gemma's hidden states, and of the sound's VAE."""
VIDEO, AUDIO = "video", "audio"
"""Parts of latents: [B, 128, T, H, W], and [B, 8, L, 1, 16] of L latent frames of sound."""
TEXT, TEXT_MASK, AUDIO_TEXT = "text", "text_mask", "audio_text"
"""Tensors of a condition: what the connectors give for the pictures [B, L, D], 1 at tokens that are
attended to [B, L], and what they give for the sound, where a run has any."""

LTX2 = ModelKind(
    transformer="diffusers.models.transformers.transformer_ltx2:LTX2VideoTransformer3DModel",
    vae="diffusers.models.autoencoders.autoencoder_kl_ltx2:AutoencoderKLLTX2Video",
    pipelines=("diffusers.pipelines.ltx2.pipeline_ltx2:LTX2Pipeline",),
    stored_like="scale_shift_table",
    # What Lightricks' trainer advises for pictures alone (ltx-trainer, docs/
    # configuration-reference.md); `to_q` alone would name the sound's and the cross attention too.
    lora_targets=tuple(
        f"{attention}.{layer}"
        for attention in ("attn1", "attn2")
        for layer in ("to_q", "to_k", "to_v", "to_out.0")
    ),
    attention_bias=True,
    # A block ends with the layers of the sound; the token of the pictures is as wide as its text.
    width="cross_attention_dim",
    time_embedder="time_embed.emb.timestep_embedder",
)


def text_rows(
    transformer: Mapping[str, object], config: LTX2PipelineConfig
) -> dict[str, tuple[int, ...]]:
    """Give the shapes of a condition's rows: the sound's text only where there is sound."""
    length, projects = config.max_sequence_length, transformer.get("use_prompt_embeddings", True)
    width = read_integer(transformer, "caption_channels", TEXT_WIDTH)
    video = width if projects else read_integer(transformer, "cross_attention_dim", 4096)
    rows: dict[str, tuple[int, ...]] = {TEXT: (length, video), TEXT_MASK: (length,)}
    if config.audio:
        audio = width if projects else read_integer(transformer, "audio_cross_attention_dim", 2048)
        rows[AUDIO_TEXT] = (length, audio)
    return rows


def part_shapes(
    main: LatentShape, transformer: Mapping[str, object], config: LTX2PipelineConfig
) -> PartShapes:
    """Give the shapes of a clip's parts: as many latent frames of sound as ``LTX2Pipeline`` makes
    for the frames of pictures."""
    frames = (main[1] - 1) * STRIDE_T + 1
    samples = read_integer(transformer, "audio_sampling_rate", 16000)
    hop = read_integer(transformer, "audio_hop_length", 160)
    stride = read_integer(transformer, "audio_scale_factor", 4)
    # The order of the divisions is the pipeline's: round() meets halves.
    length = round(frames / config.frame_rate * (samples / hop / float(stride)))
    bins = read_integer(transformer, "audio_in_channels", 128) // SOUND_CHANNELS
    return {VIDEO: main, AUDIO: (SOUND_CHANNELS, length, 1, bins)}


def clip_problems(
    config: LTX2PipelineConfig, info: LatentInfo, transformer: Mapping[str, object]
) -> Iterator[str]:
    """Say where a VAE does not fit a transformer, or neither fits LTX-2's positions, or the model
    cannot be guided as ``config`` asks."""
    yield from info.channel_problems(transformer, LATENT_CHANNELS)
    if (info.stride_t, info.stride_hw) != (STRIDE_T, STRIDE_HW):
        yield (
            f"a latent cell of the VAE spans {info.stride_t} frames of {info.stride_hw} x "
            f"{info.stride_hw} pixels; it must span {STRIDE_T} of {STRIDE_HW} x {STRIDE_HW}, which "
            "LTX-2's positions count in. Use the VAE of an LTX-2 model"
        )
    if config.stg_scale > 0:
        layers = read_integer(transformer, "num_layers", 48)
        if not transformer.get("perturbed_attn", False):
            yield (
                f"stg_scale {config.stg_scale:g} of a transformer without perturbed_attn, which "
                "calls the blocks alike with and without it. Use stg_scale: 0, or LTX-2.3"
            )
        elif missing := [block for block in config.stg_blocks if block >= layers]:
            yield (
                f"stg_blocks {missing} of a transformer of {layers} blocks, counted from 0. Name "
                "blocks that it has; LTX2Pipeline uses 28"
            )


def unsupported(transformer: Mapping[str, object]) -> Iterator[str]:
    """Say why the adapter would call the model wrongly."""
    names = ("patch_size", "patch_size_t", "audio_patch_size", "audio_patch_size_t")
    if any(read_integer(transformer, name, 1) != 1 for name in names):
        yield (
            "its transformer has patches of several latent cells, and a token must be one cell, as "
            "in all published models. Use one of these"
        )
    if read_number(transformer, "use_keyframes_abs_pos_embedding", 0):
        yield (
            "its transformer marks keyframes (LTX-2.5), which this adapter does not. Use LTX-2 or "
            "LTX-2.3"
        )
