"""HunyuanVideo's model class as one value, and the numbers of the published model. No torch here.

Sources, in diffusers 0.42.1 (58eb52c0): ``scripts/convert_hunyuan_video_to_diffusers.py``
(``HYVideo-T/2-cfgdistill``, flow shift 7), whose transformer is
``HunyuanVideoTransformer3DModel``'s default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from distill_diffusers.descriptions import LatentInfo, ModelDescription, PublishedModel
from distill_diffusers.kinds import ModelKind
from distill_diffusers.model_configs import read_integer

PIPELINE = "_class_name"
"""Entry of ``model_index.json``: other pipelines call the same transformer class otherwise."""
TEXT, TEXT_MASK, POOLED = "text", "text_mask", "pooled"
"""Tensors of a condition: Llama's hidden states [B, L, D], 1 at tokens of the prompt [B, L], and
CLIP's pooled embedding [B, P]."""

HUNYUAN_VIDEO = ModelKind(
    transformer=(
        "diffusers.models.transformers.transformer_hunyuan_video:HunyuanVideoTransformer3DModel"
    ),
    vae="diffusers.models.autoencoders.autoencoder_kl_hunyuan_video:AutoencoderKLHunyuanVideo",
    pipelines=("diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video:HunyuanVideoPipeline",),
    call_options=MappingProxyType({PIPELINE: "HunyuanVideoPipeline"}),
    stored_like="x_embedder.proj.weight",
    time_embedder="time_text_embed.timestep_embedder",
    # FastVideo adapts the attention of both streams (examples/train/configs/fine_tuning/hunyuan).
    lora_targets=(
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ),
    depths=("num_layers", "num_single_layers"),
    attention_bias=True,
)
PUBLISHED: Mapping[str, PublishedModel] = {
    "hunyuanvideo-community/HunyuanVideo": PublishedModel(
        transformers={"transformer": {}},
        latents=LatentInfo(channels=16, stride_t=4, stride_hw=8),
    )
}
"""Hub id -> numbers."""


def latent_info(vae: Mapping[str, object], channels: int, stride_hw: int) -> LatentInfo:
    """Read off ``vae/config.json`` what the VAE makes of pixels.

    Args:
        channels, stride_hw: those of the VAE's class, where the configuration has none.
    """
    return LatentInfo(
        channels=read_integer(vae, "latent_channels", channels),
        stride_t=read_integer(vae, "temporal_compression_ratio", 4),
        stride_hw=read_integer(vae, "spatial_compression_ratio", stride_hw),
    )


def unsupported(model: ModelDescription) -> Iterator[str]:
    """Say why the adapter would call the model wrongly."""
    pipeline = model.call_options[PIPELINE]
    if pipeline != "HunyuanVideoPipeline":
        yield (
            f"its model_index.json names {pipeline}, which reads a picture together with the "
            "prompt or calls the transformer otherwise; this adapter calls models as "
            "HunyuanVideoPipeline does. Use the text-to-video model, or HunyuanVideo 1.5"
        )
    elif model.main.get("guidance_embeds", True) is not True:
        yield (
            "its transformer has no guidance_embeds, and this adapter guides by that input alone, "
            "as HunyuanVideoPipeline does. Use a model that was distilled by guidance, as the "
            "published one is"
        )
    elif model.main.get("image_condition_type") is not None:
        yield (
            "its transformer reads a picture (image_condition_type), and HunyuanVideoPipeline "
            "gives it none. Use the text-to-video model"
        )


def clip_problems(info: LatentInfo, transformer: Mapping[str, object]) -> Iterator[str]:
    """Say where a VAE does not fit a transformer."""
    channels = read_integer(transformer, "in_channels", 16)
    if channels != info.channels:
        yield (
            f"the transformer has {channels} latent channels but the VAE {info.channels}; they "
            "must be of one model family. Take both from one, or name the right `components`"
        )
