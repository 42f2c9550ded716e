"""Clean latents of given frames in the place of x_t's first ones, whose times are 0 then.

For models that take given frames as the frames themselves (Wan 2.2 TI2V-5B, LTX-Video).

Letters: B batch, C channels, T latent frames, K given ones, H and W latent height and width.
"""

from __future__ import annotations

import torch
from attrs import frozen
from distill_protocols import Condition, ConditioningError
from torch import Tensor

Frames = tuple[range, ...]
"""Which frames of the video a call's frames are, in their order: of a chunk its own, beside a clean
past all of them twice."""


@frozen(kw_only=True, eq=False)
class GivenPixels:
    """Frames of clips that are given, in [0, 1], on the device of the VAE.

    Attributes:
        first: [B, 3, K, H_px, W_px].
        last: [B, 3, 1, H_px, W_px], or None.
        frames: of the whole clip.
    """

    first: Tensor
    last: Tensor | None
    frames: int


def read_given_latents(cond: Condition, name: str, x_t: Tensor, longest: int) -> Tensor | None:
    """Return the tensor ``name`` [B, C, K, H, W] of a condition for ``x_t`` [B, C, T, H, W], in its
    type and on its device; None where there is none.

    Args:
        longest: latent frames of the run's clips.

    Raises:
        ConditioningError: it is of another shape, or leaves no frame to be made.
    """
    latents = cond.tensors.get(name)
    if latents is None:
        return None
    _, channels, _, height, width = x_t.shape
    given = latents.shape[2] if latents.dim() == 5 else 0
    if tuple(latents.shape[1:]) != (channels, given, height, width) or not 0 < given < longest:
        raise ConditioningError(
            f"{name} are {list(latents.shape)}, they must be [B, {channels}, K, {height}, {width}] "
            f"with K from 1 to {longest - 1} for clips of this run and this model, which have "
            f"{longest} latent frames. Make them again with adapter.with_image"
        )
    return latents.to(x_t.device, x_t.dtype)


def insert_frames(x: Tensor, given: Tensor, frames: Frames) -> Tensor:
    """Put ``given`` [B, C, K, H, W] in the place of the video's first K frames, wherever they are
    in ``x`` [B, C, T, H, W]."""
    parts = list(x.split(1, dim=2))
    flat = _flat(frames)
    for place in first_frames(frames, given.shape[2]):
        own = given[:, :, flat[place] : flat[place] + 1]
        parts[place] = own.to(x.dtype).expand_as(parts[place])
    return torch.cat(parts, dim=2)


def frame_times(t: Tensor, frames: Frames, given: int) -> Tensor:
    """Expand ``t`` [B] or [B, T] to each frame [B, T], with 0 for the first ``given`` frames."""
    flat = _flat(frames)
    times = t if t.dim() == 2 else t[:, None].expand(-1, len(flat))
    if given == 0:
        return times
    is_predicted = torch.ones(len(flat), device=t.device)
    is_predicted[list(first_frames(frames, given))] = 0
    return times * is_predicted


def first_frames(frames: Frames, count: int) -> tuple[int, ...]:
    """List where among a call's frames the first ``count`` of the video are."""
    return tuple(place for place, frame in enumerate(_flat(frames)) if frame < count)


def predicted_frames(given: Tensor, frames: int) -> Tensor:
    """Return 0 on given frames [B, C, K, H, W] and 1 on all others of ``frames``, [1, 1, T, 1, 1].

    Raises:
        ConditioningError: all frames of the clip are given.
    """
    if given.shape[2] >= frames:
        raise ConditioningError(
            f"{given.shape[2]} latent frames are given of a clip of {frames}, which leaves nothing "
            "to be made. Give fewer, or make longer clips"
        )
    mask = torch.ones(1, 1, frames, 1, 1, device=given.device)
    mask[:, :, : given.shape[2]] = 0
    return mask


def _flat(frames: Frames) -> list[int]:
    return [frame for span in frames for frame in span]
