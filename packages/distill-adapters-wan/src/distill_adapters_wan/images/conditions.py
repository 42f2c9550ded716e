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

import torch
from distill_protocols import Condition, ConditioningError
from torch import Tensor

from distill_adapters_wan.images.shapes import EMBEDS, LATENTS, ImageKind
from distill_adapters_wan.shape import MASK_CHANNELS

Frames = tuple[range, ...]
"""Which frames of the video a call's frames are, in their order: of a chunk its own, beside a clean
past all of them twice."""


def read_image_latents(
    cond: Condition, kind: ImageKind, x_t: Tensor, frames: Frames
) -> Tensor | None:
    """Return the picture's latents for ``x_t`` [B, C, T, H, W]; None where none are read.

    Of ``channels`` [B, C, T, H, W], those of the frames at ``frames``; of ``frame`` [B, C, 1, H,
    W], if the first frame is among them.

    Raises:
        ConditioningError: they are missing, not wanted, or of another shape than ``kind`` takes.
    """
    latents = cond.tensors.get(LATENTS)
    if latents is None:
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
    last = max(span.stop for span in frames)
    length = 1 if kind == "frame" else max(last, latents.shape[2])
    expected = (channels, length, height, width)
    if tuple(latents.shape[1:]) != expected:
        raise ConditioningError(
            f"{LATENTS} are {list(latents.shape)}, they must be "
            f"[B, {', '.join(map(str, expected))}] for clips of this run and this model. "
            "Make them again with adapter.with_image; a video that is longer than they are cannot "
            "be made from them"
        )
    if kind == "frame":
        return latents.to(x_t.device, x_t.dtype) if _first_frames(frames) else None
    parts = [latents[:, :, span.start : span.stop] for span in frames]
    return torch.cat(parts, dim=2).to(x_t.device, x_t.dtype)


def read_image_embeds(cond: Condition, config: Mapping[str, object], like: Tensor) -> Tensor | None:
    """Return ``image_embeds`` in the type and on the device of ``like``; None if none are read.

    Raises:
        ConditioningError: missing, not wanted, or of another width.
    """
    width, embeds = config.get("image_dim"), cond.tensors.get(EMBEDS)
    if width is None and embeds is None:
        return None
    if width is None or embeds is None or embeds.ndim != 3 or embeds.shape[2] != width:
        raise ConditioningError(
            f"{EMBEDS} are {'missing' if embeds is None else list(embeds.shape)}, and the model "
            f"reads {'none' if width is None else f'[B, tokens, {width}]'}; Wan 2.1 reads CLIP's "
            "of the first frame, Wan 2.2 none. Make the condition with this model's "
            "adapter.with_image"
        )
    return embeds.to(like.device, like.dtype)


def append_image_channels(x_t: Tensor, image: Tensor, frames: Frames) -> Tensor:
    """Return ``cat[x_t, mask, image]`` [B, 2 C + 4, T, H, W]."""
    mask = x_t.new_zeros(x_t.shape[0], MASK_CHANNELS, *x_t.shape[2:])
    for first in _first_frames(frames):
        mask[:, :, first] = 1
    return torch.cat([x_t, mask, image], dim=1)


def insert_first_frame(x: Tensor, image: Tensor, frames: Frames) -> Tensor:
    """Put ``image`` [B, C, 1, H, W] in ``x`` [B, C, T, H, W] wherever the first frame is."""
    parts = list(x.split(1, dim=2))
    for first in _first_frames(frames):
        parts[first] = image.to(x.dtype).expand_as(parts[first])
    return torch.cat(parts, dim=2)


def frame_times(t: Tensor, frames: Frames, *, first_is_given: bool) -> Tensor:
    """Expand ``t`` [B] or [B, T] to each frame [B, T], with 0 for a first frame that is given."""
    length = sum(map(len, frames))
    times = t if t.dim() == 2 else t[:, None].expand(-1, length)
    if not first_is_given:
        return times
    is_predicted = torch.ones(length, device=t.device)
    is_predicted[list(_first_frames(frames))] = 0
    return times * is_predicted


def _first_frames(frames: Frames) -> tuple[int, ...]:
    """List where among a call's frames the video's first is."""
    flat = [frame for span in frames for frame in span]
    return tuple(i for i, frame in enumerate(flat) if frame == 0)
