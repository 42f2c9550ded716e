"""Z-Image's model class as one value, and what cannot be called as one. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from distill_diffusers.descriptions import LatentInfo, ModelDescription
from distill_diffusers.kinds import ModelKind
from distill_diffusers.model_configs import read_integer, read_integers

from distill_adapters_z_image.published import LATENT_CHANNELS, PATCH

PIPELINE = "_class_name"
"""Entry of ``model_index.json``: other pipelines call the same class otherwise."""
TEXT, TEXT_MASK = "text", "text_mask"
"""Tensors of a condition: Qwen3's embeddings [B, L, D], those of the prompt first, and [B, L], 1 at
these."""

Z_IMAGE = ModelKind(
    transformer="diffusers.models.transformers.transformer_z_image:ZImageTransformer2DModel",
    vae="diffusers.models.autoencoders.autoencoder_kl:AutoencoderKL",
    pipelines=("diffusers.pipelines.z_image.pipeline_z_image:ZImagePipeline",),
    call_options=MappingProxyType({PIPELINE: "ZImagePipeline"}),
    stored_like="x_pad_token",
    time_embedder="t_embedder",
    # What DiffSynth-Studio adapts (examples/z_image/model_training/lora/Z-Image.sh).
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"),
    # Not the refiners of text and picture before them: hidden states are those of picture and text.
    block_lists=("layers",),
    depths=("n_layers",),
    width="dim",
    attention_bias=True,
)


def latent_info(vae: Mapping[str, object]) -> LatentInfo:
    """Read off ``vae/config.json`` what the VAE makes of pixels."""
    halvings = len(read_integers(vae, "block_out_channels")) - 1
    return LatentInfo(channels=read_integer(vae, "latent_channels"), stride_hw=2**halvings)


def unsupported(model: ModelDescription) -> Iterator[str]:
    """Say why the adapter would call the model wrongly."""
    pipeline = model.call_options[PIPELINE]
    reads_pictures = model.main.get("siglip_feat_dim") is not None
    if pipeline != "ZImagePipeline" or reads_pictures:
        what = "its transformer reads pictures" if reads_pictures else f"it is a {pipeline}'s"
        yield (
            f"{what}, and this adapter calls models as ZImagePipeline does, from a text alone. Use "
            "Z-Image or Z-Image-Turbo"
        )
    patches = [
        read_integers(model.main, f"all_{name}patch_size", (default,))
        for name, default in (("", PATCH), ("f_", 1))
    ]
    if patches != [(PATCH,), (1,)]:
        yield (
            f"its transformer has patches of {patches[0]} latent cells and {patches[1]} frames, "
            f"and ZImagePipeline calls it with {PATCH} and 1. Use a published model"
        )


def clip_problems(info: LatentInfo, transformer: Mapping[str, object]) -> Iterator[str]:
    """Say where a VAE does not fit a transformer."""
    channels = read_integer(transformer, "in_channels", LATENT_CHANNELS)
    if channels != info.channels:
        yield (
            f"the VAE makes latents of {info.channels} channels and the transformer reads "
            f"{channels}; take VAE and transformer of one model"
        )
