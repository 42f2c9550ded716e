"""HunyuanVideo 1.5's model class as one value, and the published models. No torch here.

Sources, in diffusers 0.42.1 (58eb52c0): ``scripts/convert_hunyuan_video1_5_to_diffusers.py``
(sizes, MeanFlow), whose transformers have the defaults of ``HunyuanVideo15Transformer3DModel``
otherwise; hub ids: the collection hunyuanvideo-community/hunyuanvideo-15 that the README of
Tencent-Hunyuan/HunyuanVideo-1.5 (60783e70) names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from distill_diffusers.descriptions import LatentInfo, ModelDescription, PublishedModel
from distill_diffusers.kinds import ModelKind
from distill_diffusers.model_configs import read_integer
from distill_protocols import RoleSpec

PIPELINE = "_class_name"
"""Entry of ``model_index.json``: which of the two pipelines calls the transformer."""
FROM_IMAGE = "HunyuanVideo15ImageToVideoPipeline"
TEXT, TEXT_MASK = "text", "text_mask"
"""Tensors of a condition: Qwen2.5-VL's hidden states [B, L, D], and 1 at tokens of the prompt."""
GLYPHS, GLYPH_MASK = "glyphs", "glyph_mask"
"""Likewise ByT5's, of what stands in quotes; 0 where nothing does."""
IMAGE_LATENTS, IMAGE_EMBEDS = "image_latents", "image_embeds"
"""Of an image-to-video model the first frame's normalised latents [B, C, 1, H, W], and SigLIP's
last hidden states [B, 729, D]."""
IMAGE_TOKENS = 729
"""27 x 27 patches of a picture of 384 pixels. A text-to-video model gets as many zeros."""
CHANNELS = 32
"""Of the latents: 1 + 2 C are the transformer's, those of x_t, of a first frame and of a mask."""

HUNYUAN_VIDEO15 = ModelKind(
    transformer=(
        "diffusers.models.transformers.transformer_hunyuan_video15:HunyuanVideo15Transformer3DModel"
    ),
    vae="diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15:AutoencoderKLHunyuanVideo15",
    pipelines=(
        "diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5:HunyuanVideo15Pipeline",
        "diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5_image2video:"
        "HunyuanVideo15ImageToVideoPipeline",
    ),
    call_options=MappingProxyType({PIPELINE: "HunyuanVideo15Pipeline"}),
    stored_like="x_embedder.proj.weight",
    time_embedder="time_embed.timestep_embedder",
    lora_targets=(
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    ),
    attention_bias=True,
)


def _published(target_size: int, pipeline: str, *, meanflow: bool = False) -> PublishedModel:
    transformer: dict[str, object] = {"target_size": target_size}
    if meanflow:
        transformer["use_meanflow"] = True
    return PublishedModel(
        transformers={"transformer": transformer},
        latents=LatentInfo(channels=CHANNELS, stride_t=4, stride_hw=16),
        call_options={PIPELINE: pipeline},
    )


_HUB = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers"
_FROM_TEXT = "HunyuanVideo15Pipeline"
PUBLISHED: Mapping[str, PublishedModel] = {
    f"{_HUB}-480p_t2v": _published(640, _FROM_TEXT),
    f"{_HUB}-720p_t2v": _published(960, _FROM_TEXT),
    f"{_HUB}-480p_i2v": _published(640, FROM_IMAGE),
    f"{_HUB}-720p_i2v": _published(960, FROM_IMAGE),
    f"{_HUB}-480p_t2v_distilled": _published(640, _FROM_TEXT),
    f"{_HUB}-480p_i2v_distilled": _published(640, FROM_IMAGE),
    f"{_HUB}-720p_i2v_distilled": _published(960, FROM_IMAGE),
    f"{_HUB}-480p_i2v_step_distilled": _published(640, FROM_IMAGE, meanflow=True),
}
"""Hub id -> numbers."""


def image_shapes(
    transformer: Mapping[str, object], latents: tuple[int, int, int, int]
) -> dict[str, tuple[int, ...]]:
    """Give the shapes of one row of a first frame, for clips of ``latents`` [C, T, H, W]."""
    channels, _, height, width = latents
    return {
        IMAGE_LATENTS: (channels, 1, height, width),
        IMAGE_EMBEDS: (IMAGE_TOKENS, read_integer(transformer, "image_embed_dim", 1152)),
    }


def reads_image(model: ModelDescription) -> bool:
    """Return whether a model is called with a first frame."""
    return model.call_options[PIPELINE] == FROM_IMAGE


def uses_meanflow(transformer: Mapping[str, object]) -> bool:
    """Return whether a transformer predicts average velocities between two times."""
    return transformer.get("use_meanflow") is True


def unsupported(model: ModelDescription) -> Iterator[str]:
    """Say why the adapter would call the model wrongly."""
    pipeline = model.call_options[PIPELINE]
    if pipeline not in (_FROM_TEXT, FROM_IMAGE):
        yield (
            f"its model_index.json names {pipeline}, and this adapter calls models as "
            f"{_FROM_TEXT} and {FROM_IMAGE} do. Use a model of one of these"
        )
    elif uses_meanflow(model.main) and pipeline == _FROM_TEXT:
        yield (
            "its transformer predicts average velocities between two times (use_meanflow), and "
            f"{_FROM_TEXT} gives it one. Use the model of {FROM_IMAGE}"
        )


def role_problem(role: RoleSpec, model: ModelDescription) -> str | None:
    """Say why a supported model cannot have a role; None where it can."""
    if role.trainable and uses_meanflow(model.main):
        return (
            "its transformer predicts average velocities over the steps of a sampler (use_meanflow)"
            ", and methods here train the velocity at one time. Train the model that it was "
            "distilled from"
        )
    return None


def clip_problems(info: LatentInfo, transformer: Mapping[str, object]) -> Iterator[str]:
    """Say where a VAE does not fit a transformer."""
    channels = read_integer(transformer, "in_channels", 2 * CHANNELS + 1)
    if channels != 2 * info.channels + 1:
        yield (
            f"the transformer reads {channels} channels and the VAE makes {info.channels}; there "
            "must be twice those of the VAE and one more, for x_t, a first frame and its mask. "
            "Take both from one model, or name the right `components`"
        )
