"""Given frames as a condition: which tensors a model reads of them, and how they meet x_t.

===========  ======================================  ============================================
kind         condition tensors beside ``text``       model input
===========  ======================================  ============================================
``channels`` ``image_latents`` [B, C, T, H, W];      ``cat[x_t, mask (4), image_latents]`` on the
             Wan 2.1 also ``image_embeds``           channels; the mask is ``image_mask``, or else 1
             [B, 257, 1280], and with a last frame   on the first latent frame and 0 elsewhere
             [B, 514, 1280]; ``image_mask``
             [B, 4, T] where a last frame is given
``frame``    ``image_latents`` [B, C, K, H, W], or   ``image_latents`` in the place of x_t's first
             none: then it is text-to-video          K frames, whose tokens have t = 0
===========  ======================================  ============================================

``image_latents`` are normalised: of ``channels`` the VAE's mode of the clip (frame, grey, grey ...,
and the last frame where it is given), of ``frame`` that of the given frames alone.
``image_embeds`` are CLIP's last hidden states but one, the first frame's before the last one's.
Letters: B batch, C channels, T latent frames, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from distill_diffusers.calls.given_frames import Frames
from distill_protocols import Condition, ConditioningError
from torch import Tensor

from distill_adapters_wan.images.shapes import (
    EMBEDS,
    LATENTS,
    MASK,
    MASK_CHANNELS,
    PAIR_TOKENS,
    reads_pairs,
)


def read_image_channels(cond: Condition, x_t: Tensor, frames: Frames) -> Tensor:
    """Return mask and picture's latents [B, 4 + C, T, H, W] for ``x_t`` [B, C, T, H, W]: those of
    the frames at ``frames``.

    Raises:
        ConditioningError: they are missing, or of another shape than ``x_t``.
    """
    latents = cond.tensors.get(LATENTS)
    if latents is None:
        raise ConditioningError(
            f"the condition holds {sorted(cond.tensors)}, but this image-to-video model reads "
            f"{LATENTS!r} too: without a first frame there is nothing to animate. Make the "
            "condition with adapter.with_image, or use a data set that holds it"
        )
    _, channels, _, height, width = x_t.shape
    length = max(max(span.stop for span in frames), latents.shape[2])
    _check_shape(LATENTS, latents, (channels, length, height, width))
    mask = cond.tensors.get(MASK)
    if mask is None:
        mask = first_frame_mask(latents.shape[2]).expand(len(latents), -1, -1)
    _check_shape(MASK, mask, (MASK_CHANNELS, latents.shape[2]))
    whole = mask.to(latents)[..., None, None].expand(-1, -1, -1, height, width)
    both = torch.cat([whole, latents], dim=1)
    parts = [both[:, :, span.start : span.stop] for span in frames]
    return torch.cat(parts, dim=2).to(x_t.device, x_t.dtype)


def refuse_images(cond: Condition) -> None:
    """Refuse given frames for a model that reads text alone.

    Raises:
        ConditioningError: there are some.
    """
    if LATENTS in cond.tensors:
        raise ConditioningError(
            f"the condition holds {LATENTS!r}, but this model reads text alone; the picture would "
            "have no effect. Leave it out, or use an image-to-video model"
        )


def read_image_embeds(cond: Condition, config: Mapping[str, object], like: Tensor) -> Tensor | None:
    """Return ``image_embeds`` in the type and on the device of ``like``; None if none are read.

    Raises:
        ConditioningError: missing, not wanted, or of another width or number of pictures.
    """
    width, embeds = config.get("image_dim"), cond.tensors.get(EMBEDS)
    if width is None and embeds is None:
        return None
    tokens = config[PAIR_TOKENS] if reads_pairs(config) else None
    if (
        width is None
        or embeds is None
        or embeds.ndim != 3
        or embeds.shape[2] != width
        or tokens not in (None, embeds.shape[1])
    ):
        reads = f"[B, {'tokens' if tokens is None else tokens}, {width}]"
        raise ConditioningError(
            f"{EMBEDS} are {'missing' if embeds is None else list(embeds.shape)}, and the model "
            f"reads {'none' if width is None else reads}; Wan 2.1 reads CLIP's of the first frame "
            "(FLF2V of the last one too), Wan 2.2 none. Make the condition with this model's "
            "adapter.with_image"
        )
    return embeds.to(like.device, like.dtype)


def first_frame_mask(length: int) -> Tensor:
    """Mark the first of ``length`` latent frames as given: [1, 4, T]."""
    mask = torch.zeros(1, MASK_CHANNELS, length)
    mask[:, :, 0] = 1
    return mask


def frame_mask(length: int) -> Tensor:
    """Mark the first and the last pixel frame of ``length`` latent frames as given: [1, 4, T].

    The first latent frame is one pixel frame and has it in all four places, every other latent
    frame has four, in their order; as ``WanImageToVideoPipeline.prepare_latents``.
    """
    mask = first_frame_mask(length)
    mask[:, -1, -1] = 1
    return mask


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape[1:]) != expected:
        raise ConditioningError(
            f"{name} are {list(tensor.shape)}, they must be [B, {', '.join(map(str, expected))}] "
            "for clips of this run and this model. Make them again with adapter.with_image; a "
            "video that is longer than they are cannot be made from them"
        )
