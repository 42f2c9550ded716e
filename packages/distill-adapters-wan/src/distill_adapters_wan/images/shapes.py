"""Names and shapes of what a model reads of given frames. No torch: run files are checked here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from distill_diffusers.model_configs import read_integer
from distill_protocols import FrameConditions, WeightsError

ImageKind = Literal["none", "channels", "frame"]
"""How a model takes a first frame: not at all, as further channels, as the frame itself."""

TEXT, LATENTS, EMBEDS, MASK = "text", "image_latents", "image_embeds", "image_mask"
MASK_CHANNELS = 4
"""Beside a picture's latents: which of the four pixel frames of a latent frame are given."""
PAIR_TOKENS = "pos_embed_seq_len"
"""Entry of the configuration of a model that reads the embeddings of two pictures: the tokens of
both, which have positions of their own."""
CLIP_TOKENS = 257
"""16 x 16 patches of 224 pixels, and the class token."""


def image_kind(transformer: Mapping[str, object], expand_timesteps: object) -> ImageKind:
    """Tell how a model that ``shape.unsupported`` accepts takes a first frame."""
    if transformer.get("in_channels", 16) != (transformer.get("out_channels") or 16):
        return "channels"
    return "frame" if expand_timesteps else "none"


def reads_pairs(transformer: Mapping[str, object]) -> bool:
    """Tell whether a model reads the embeddings of a first and of a last frame (FLF2V)."""
    return transformer.get("image_dim") is not None and transformer.get(PAIR_TOKENS) is not None


def frame_conditions(
    transformer: Mapping[str, object], kind: ImageKind, frames_a_latent: int
) -> FrameConditions:
    """Tell which frames of a clip a model can be given.

    Without CLIP's embedding (Wan 2.2) nothing but the mask says which frames are given, so a last
    one may be. What a model takes as the frames themselves may be several.
    """
    if kind == "frame":
        return FrameConditions(first="optional", several=True, frames_a_latent=frames_a_latent)
    if kind == "none":
        return FrameConditions()
    if transformer.get("image_dim") is None:
        return FrameConditions(first="always", last="optional")
    return FrameConditions(first="always", last="always" if reads_pairs(transformer) else "never")


def needed_shapes(
    transformer: Mapping[str, object],
    kind: ImageKind,
    latent_shape: tuple[int, int, int, int],
    tokens: int = CLIP_TOKENS,
) -> dict[str, tuple[int, ...]]:
    """Return shapes of one row of what the model cannot do without; a ``frame`` may be missing."""
    if kind != "channels":
        return {}
    shapes: dict[str, tuple[int, ...]] = {LATENTS: latent_shape}
    if transformer.get("image_dim") is not None:
        pictures = 1 + reads_pairs(transformer)
        shapes[EMBEDS] = (pictures * tokens, read_integer(transformer, "image_dim"))
    if reads_pairs(transformer):
        shapes[MASK] = (MASK_CHANNELS, latent_shape[1])
    return shapes


def clip_tokens(vision: Mapping[str, object]) -> int:
    """Count the tokens of an image encoder by its configuration (transformers' defaults else).

    Raises:
        WeightsError: its sizes are no two numbers.
    """
    image, patch = vision.get("image_size", 224), vision.get("patch_size", 32)
    if not isinstance(image, int) or not isinstance(patch, int):
        raise WeightsError(
            f"image_encoder/config.json has image_size {image} and patch_size {patch}, which must "
            "be one number each; use the folder of a CLIP model"
        )
    return (image // patch) ** 2 + 1
