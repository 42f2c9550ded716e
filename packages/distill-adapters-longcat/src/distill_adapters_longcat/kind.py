"""LongCat-Video's model class as one value, and what cannot be called as one. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from distill_diffusers.descriptions import LatentInfo, ModelDescription
from distill_diffusers.kinds import ModelKind
from distill_diffusers.model_configs import read_integer, read_integers
from distill_protocols import FrameConditions

from distill_adapters_longcat.published import LATENT_CHANNELS

CLASS = "LongCatVideoTransformer3DModel"
PATCH = (1, 2, 2)
"""Latent frames, height and width of a token."""
DIT = "dit"
"""Name of the transformer's folder."""
TEXT, TEXT_MASK, GIVEN = "text", "text_mask", "image_latents"
"""Tensors of a condition: UMT5's embeddings [B, L, D]; [B, L], 1 at tokens of the prompt; and, if
the first frames of the clip are given, their normalised latents [B, C, frames, H, W]."""

LONGCAT = ModelKind(
    transformer=f"distill_adapters_longcat.transformer:{CLASS}",
    vae="diffusers.models.autoencoders.autoencoder_kl_wan:AutoencoderKLWan",
    has_index=False,
    modules=(DIT,),
    stored_like="x_embedder.proj.weight",
    time_embedder="t_embedder",
    # All linear layers of a block but its modulation: attention as in SimpleTuner, and the MLP.
    lora_targets=("qkv", "proj", "q_linear", "kv_linear", "w1", "w2", "w3"),
    depths=("depth",),
)


def unsupported(model: ModelDescription) -> Iterator[str]:
    """Say why the adapter would call the model wrongly."""
    config = model.main
    if (name := config.get("_class_name", CLASS)) != CLASS:
        yield (
            f"its transformer is a {name}, and this adapter calls {CLASS} alone (LongCat-Video, "
            "not its avatars). Use that model"
        )
    if config.get("enable_bsa"):
        yield (
            "its transformer has block-sparse attention switched on (enable_bsa), which the "
            "original uses to refine clips to 720p and which is not here. Set it to false in "
            f"{DIT}/config.json to train the model with full attention"
        )
    if read_integers(config, "patch_size", PATCH) != PATCH:
        yield (
            f"its transformer has patches of {config['patch_size']}, and a token must be "
            f"{' x '.join(map(str, PATCH))} latent cells, of one frame, which has a time of its "
            "own. Use the published model"
        )
    width, heads = read_integer(config, "hidden_size", 4096), read_integer(config, "num_heads", 32)
    if width % heads or (width // heads) % 8:
        yield (
            f"its transformer has {heads} heads of {width} channels; each must have a multiple of "
            "8, which are shared out over time, height and width. Use the published model"
        )


def clip_problems(info: LatentInfo, transformer: Mapping[str, object]) -> Iterator[str]:
    """Say where a VAE does not fit a transformer."""
    yield from info.channel_problems(transformer, LATENT_CHANNELS)


def frame_conditions(frames_a_latent: int) -> FrameConditions:
    """Tell which frames of a clip can be given: none, the first, or several that it goes on from.

    Args:
        frames_a_latent: frames that the VAE makes one latent frame of, after the first.
    """
    return FrameConditions(first="optional", several=True, frames_a_latent=frames_a_latent)
