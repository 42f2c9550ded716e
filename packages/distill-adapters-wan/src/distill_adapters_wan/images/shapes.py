"""Names and shapes of what a model reads of a first frame. No torch: run files are checked here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from distill_diffusers.model_configs import read_integer
from distill_protocols import WeightsError

ImageKind = Literal["none", "channels", "frame"]
"""How a model takes a first frame: not at all, as further channels, as the frame itself."""

TEXT, LATENTS, EMBEDS = "text", "image_latents", "image_embeds"
CLIP_TOKENS = 257
"""16 x 16 patches of 224 pixels, and the class token."""


def image_kind(transformer: Mapping[str, object], expand_timesteps: object) -> ImageKind:
    """Tell how a model that ``shape.unsupported`` accepts takes a first frame."""
    if transformer.get("in_channels", 16) != (transformer.get("out_channels") or 16):
        return "channels"
    return "frame" if expand_timesteps else "none"


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
        shapes[EMBEDS] = (tokens, read_integer(transformer, "image_dim"))
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
