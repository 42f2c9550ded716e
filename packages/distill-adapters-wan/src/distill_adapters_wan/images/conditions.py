"""A first frame as a condition: which tensors a model reads of it, and how they meet x_t.

===========  ======================================  ============================================
kind         condition tensors beside ``text``       model input
===========  ======================================  ============================================
``channels`` ``image_latents`` [B, C, T, H, W];      ``cat[x_t, mask (4), image_latents]`` on the
             Wan 2.1 also ``image_embeds``           channels; the mask is 1 on the first latent
             [B, 257, 1280]                          frame and 0 elsewhere
``frame``    ``image_latents`` [B, C, 1, H, W], or   ``image_latents`` in the place of x_t's first
             none: then it is text-to-video          frame, whose tokens have t = 0
===========  ======================================  ============================================

``image_latents`` are normalised: of ``channels`` the VAE's mode of the clip (frame, grey, grey
...), of ``frame`` that of the frame alone. ``image_embeds`` are CLIP's last hidden states but one.
Letters: B batch, C channels, T latent frames, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from distill_protocols import Condition, ConditioningError
from torch import Tensor

from distill_adapters_wan.images.shapes import EMBEDS, LATENTS, ImageKind
from distill_adapters_wan.shape import MASK_CHANNELS

Places = tuple[range, ...]
"""Frames of the video that a call's frames are, in their order: of a chunk its own, beside a clean
past all of them twice."""


def latents_of(cond: Condition, kind: ImageKind, x_t: Tensor, places: Places) -> Tensor | None:
    """The picture's latents for ``x_t`` [B, C, T, H, W], on its device; None where none is read.

    Of ``channels`` [B, C, T, H, W], those of the frames at ``places``; of ``frame`` [B, C, 1, H,
    W], if the first frame is among them.

    Raises:
        ConditioningError: they are missing, not wanted, or of another shape than ``kind`` takes.
    """
    found = cond.tensors.get(LATENTS)
    if found is None:
        if kind == "channels":
            raise ConditioningError(
                f"the condition holds {sorted(cond.tensors)}, but this image-to-video model reads "
                f"{LATENTS!r} too: without a first frame there is nothing to animate. Make the "
                "condition with adapter.with_image, or use a data set that holds it"
            )
        return None
    if kind == "none":
        raise ConditioningError(
            f"the condition holds {LATENTS!r}, but this model reads text alone; the picture would "
            "have no effect. Leave it out, or use an image-to-video model"
        )
    _, channels, _, height, width = x_t.shape
    last = max(place.stop for place in places)
    frames = 1 if kind == "frame" else max(last, found.shape[2])
    wanted = (channels, frames, height, width)
    if tuple(found.shape[1:]) != wanted:
        raise ConditioningError(
            f"{LATENTS} are {list(found.shape)}, they must be [B, {', '.join(map(str, wanted))}] "
            "for clips of this run and this model. Make them again with adapter.with_image; a "
            "video that is longer than they are cannot be made from them"
        )
    if kind == "frame":
        return found.to(x_t.device, x_t.dtype) if _starts(places) else None
    parts = [found[:, :, place.start : place.stop] for place in places]
    return torch.cat(parts, dim=2).to(x_t.device, x_t.dtype)


def embeds_of(cond: Condition, config: Mapping[str, Any], like: Tensor) -> Tensor | None:
    """``image_embeds`` in the type and on the device of ``like``; None where none are read.

    Raises:
        ConditioningError: missing, not wanted, or of another width.
    """
    width, found = config.get("image_dim"), cond.tensors.get(EMBEDS)
    if width is None and found is None:
        return None
    if width is None or found is None or found.ndim != 3 or found.shape[2] != width:
        raise ConditioningError(
            f"{EMBEDS} are {'missing' if found is None else list(found.shape)}, and the model "
            f"reads {'none' if width is None else f'[B, tokens, {width}]'}; Wan 2.1 reads CLIP's "
            "of the first frame, Wan 2.2 none. Make the condition with this model's "
            "adapter.with_image"
        )
    return found.to(like.device, like.dtype)


def beside_channels(x_t: Tensor, image: Tensor, places: Places) -> Tensor:
    """``cat[x_t, mask, image]`` [B, 2 C + 4, T, H, W]."""
    mask = x_t.new_zeros(x_t.shape[0], MASK_CHANNELS, *x_t.shape[2:])
    for first in _starts(places):
        mask[:, :, first] = 1
    return torch.cat([x_t, mask, image], dim=1)


def first_frame_given(x: Tensor, image: Tensor, places: Places) -> Tensor:
    """``x`` [B, C, T, H, W] with ``image`` [B, C, 1, H, W] wherever the first frame is."""
    parts = list(x.split(1, dim=2))
    for first in _starts(places):
        parts[first] = image.to(x.dtype).expand_as(parts[first])
    return torch.cat(parts, dim=2)


def frame_times(t: Tensor, places: Places, *, given: bool) -> Tensor:
    """``t`` [B] or [B, T] for each frame [B, T]; 0 in the first where it is ``given``."""
    frames = sum(map(len, places))
    times = t if t.dim() == 2 else t[:, None].expand(-1, frames)
    if not given:
        return times
    predicted = torch.ones(frames, device=t.device)
    predicted[list(_starts(places))] = 0
    return times * predicted


def _starts(places: Places) -> tuple[int, ...]:
    """Where the video's first frame is."""
    flat = [frame for place in places for frame in place]
    return tuple(i for i, frame in enumerate(flat) if frame == 0)
