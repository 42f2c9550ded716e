"""LTX-Video's model class as one value, and what cannot be called as one. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from distill_diffusers.descriptions import LatentInfo, ModelDescription
from distill_diffusers.kinds import ModelKind
from distill_protocols import FrameConditions

from distill_adapters_ltx.published import LATENT_CHANNELS, STRIDE_HW, STRIDE_T

PIPELINE = "_class_name"
"""Entry of ``model_index.json``: pipelines call the same transformer with other positions."""
PLAIN, FROM_IMAGE, CONDITION = "LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline"
"""The first two call a model alike, from text and from a first frame."""
TEXT, TEXT_MASK = "text", "text_mask"
"""Tensors of a condition: T5's embeddings [B, L, D], and [B, L], 1 at tokens of the prompt."""
FIRST, LAST = "image_latents", "last_latents"
"""And, where frames are given, their normalised latents: of the first ones [B, C, K, H, W], and of
the last one [B, C, 1, H, W]."""

LTX = ModelKind(
    transformer="diffusers.models.transformers.transformer_ltx:LTXVideoTransformer3DModel",
    vae="diffusers.models.autoencoders.autoencoder_kl_ltx:AutoencoderKLLTXVideo",
    pipelines=(
        "diffusers.pipelines.ltx.pipeline_ltx:LTXPipeline",
        "diffusers.pipelines.ltx.pipeline_ltx_image2video:LTXImageToVideoPipeline",
        "diffusers.pipelines.ltx.pipeline_ltx_condition:LTXConditionPipeline",
    ),
    call_options=MappingProxyType({PIPELINE: PLAIN}),
    stored_like="scale_shift_table",
    # What Lightricks' trainer adapts (LTX-Video-Trainer, configs/ltxv_2b_lora.yaml).
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    attention_bias=True,
    time_embedder="time_embed.emb.timestep_embedder",
)


def unsupported(model: ModelDescription) -> Iterator[str]:
    """Say why the adapter would call the model wrongly."""
    pipeline = model.call_options[PIPELINE]
    if pipeline not in (PLAIN, FROM_IMAGE, CONDITION):
        yield (
            f"its model_index.json names {pipeline}, which may call the transformer otherwise than "
            f"{PLAIN} and {CONDITION} do, whose models this adapter calls. Use one of these (0.9.0 "
            "to 0.9.8)"
        )
    patch = model.main.get("patch_size", 1), model.main.get("patch_size_t", 1)
    if patch != (1, 1):
        yield (
            f"its transformer has patches of {patch[1]} x {patch[0]} x {patch[0]} latent cells, "
            "and a token must be one cell, as in all published models. Use one of these"
        )


def clip_problems(info: LatentInfo, transformer: Mapping[str, object]) -> Iterator[str]:
    """Say where a VAE does not fit a transformer, or neither fits LTX's positions."""
    yield from info.channel_problems(transformer, LATENT_CHANNELS)
    if (info.stride_t, info.stride_hw) != (STRIDE_T, STRIDE_HW):
        yield (
            f"a latent cell of the VAE spans {info.stride_t} frames of {info.stride_hw} x "
            f"{info.stride_hw} pixels; it must span {STRIDE_T} of {STRIDE_HW} x {STRIDE_HW}, which "
            "LTX's positions count in. Use the VAE of an LTX-Video model"
        )


def frame_conditions(pipeline: object) -> FrameConditions:
    """Say which frames of a clip models of ``pipeline`` can be given: first ones in the place of
    noise; the last one as further tokens, as ``LTXConditionPipeline`` alone has it."""
    return FrameConditions(
        first="optional",
        several=True,
        last="optional" if pipeline == CONDITION else "never",
        frames_a_latent=STRIDE_T,
    )


def padding_entry(pipeline: object) -> dict[str, str]:
    """Say as an entry of a fingerprint whether T5 attends to the padding of a prompt: in
    ``LTXConditionPipeline`` it does not."""
    return {"text_encoder.padding": "masked" if pipeline == CONDITION else "attended"}
