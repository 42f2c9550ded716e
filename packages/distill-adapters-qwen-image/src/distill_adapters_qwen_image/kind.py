"""Qwen-Image's model class as one value, and what cannot be called as one. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from distill_diffusers.descriptions import LatentInfo, ModelDescription
from distill_diffusers.kinds import ModelKind
from distill_diffusers.model_configs import read_integer, read_integers

from distill_adapters_qwen_image.published import LATENT_CHANNELS, PATCH

PIPELINE = "_class_name"
"""Entry of ``model_index.json``: the pipelines that edit pictures call the same class otherwise."""
TEXT, TEXT_MASK = "text", "text_mask"
"""Tensors of a condition: Qwen2.5-VL's embeddings [B, L, D], and [B, L], 1 at tokens of the
prompt."""

QWEN_IMAGE = ModelKind(
    transformer=("diffusers.models.transformers.transformer_qwenimage:QwenImageTransformer2DModel"),
    vae="diffusers.models.autoencoders.autoencoder_kl_qwenimage:AutoencoderKLQwenImage",
    pipelines=("diffusers.pipelines.qwenimage.pipeline_qwenimage:QwenImagePipeline",),
    call_options=MappingProxyType({PIPELINE: "QwenImagePipeline"}),
    stored_like="txt_norm.weight",
    time_embedder="time_text_embed.timestep_embedder",
    # What DiffSynth-Studio adapts (examples/qwen_image/model_training/lora/Qwen-Image.sh).
    lora_targets=(
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"),
        *("to_add_out", "img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1"),
    ),
    attention_bias=True,
)

_OTHER_PIPELINES = ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope", "zero_cond_t")
"""Flags of the transformer that QwenImagePipeline's call of it has nothing for."""


def latent_info(vae: Mapping[str, object]) -> LatentInfo:
    """Read off ``vae/config.json`` what the VAE makes of a picture: a video VAE with one frame."""
    halvings = read_integers(vae, "temperal_downsample", (False, True, True))
    return LatentInfo(
        channels=read_integer(vae, "z_dim", LATENT_CHANNELS), stride_hw=2 ** len(halvings)
    )


def unsupported(model: ModelDescription) -> Iterator[str]:
    """Say why the adapter would call the model wrongly."""
    pipeline = model.call_options[PIPELINE]
    flags = [name for name in _OTHER_PIPELINES if model.main.get(name)]
    if pipeline != "QwenImagePipeline" or flags:
        what = f"its transformer has {' and '.join(flags)}" if flags else f"it is a {pipeline}'s"
        yield (
            f"{what}, and this adapter calls models as QwenImagePipeline does, from a text alone. "
            "Use Qwen-Image or Qwen-Image-2512"
        )
    patch = read_integer(model.main, "patch_size", PATCH)
    if patch != PATCH:
        yield (
            f"its transformer has patches of {patch} x {patch} latent cells, and "
            f"QwenImagePipeline packs {PATCH} x {PATCH}. Use a published model"
        )


def clip_problems(info: LatentInfo, transformer: Mapping[str, object]) -> Iterator[str]:
    """Say where a VAE does not fit a transformer."""
    taken = read_integer(transformer, "in_channels", LATENT_CHANNELS * PATCH**2)
    given = read_integer(transformer, "out_channels", LATENT_CHANNELS) * PATCH**2
    if {taken, given} != {info.channels * PATCH**2}:
        yield (
            f"the transformer takes tokens of {taken} channels and gives {given}, but four cells "
            f"of the VAE have {info.channels * PATCH**2}; they must be of one model family. Take "
            "both from one, or name the right `components`"
        )
