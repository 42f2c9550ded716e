"""How LongCat-Video is called: from text, from a first frame, or going on from several.

What is true of any flow-matching model is in ``distill_diffusers.adapter``. As the original samples
(meituan-longcat/LongCat-Video at commit 6b3f4b8, ``pipeline_longcat_video.py``):

- a first frame (``generate_i2v``) is part of each call, and of the scale of CFG-zero;
- several first frames (``generate_vc``) are read once, before the first step; calls have the others
  alone, and so has the scale of CFG-zero.

Letters: B batch, C channels, T latent frames, K given ones, H and W latent height and width, L text
tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from distill_diffusers.adapter import VelocityCall, device_of
from distill_diffusers.calls.conditions import read_condition
from distill_diffusers.calls.given_frames import (
    frame_times,
    insert_frames,
    predicted_frames,
    read_given_latents,
)
from distill_diffusers.components.statistics import LatentStatistics
from distill_diffusers.components.umt5 import clean_prompts, umt5_encoders
from distill_diffusers.family import DiffusersFamily
from distill_diffusers.family_adapter import FamilyAdapter
from distill_protocols import (
    Condition,
    ImageConditioning,
    ModelBundle,
    RoleHandle,
)
from torch import Tensor

from distill_adapters_longcat.calling import call_transformer, read_frames
from distill_adapters_longcat.config import LongCatPipelineConfig
from distill_adapters_longcat.kind import GIVEN, TEXT, TEXT_MASK, frame_conditions
from distill_adapters_longcat.layers import KeysAndValues


class LongCatAdapter(FamilyAdapter):
    """``DistillAdapter`` and ``ImageConditioning`` of LongCat-Video.

    A condition is ``text`` [B, L, D] and ``text_mask`` [B, L] and, where first frames are given,
    ``image_latents`` [B, C, K, H, W].

    Args:
        bundle: roles, each with a module ``dit`` or, of a discriminator, ``heads``.
        family: ``PLUGIN``.
        config: the run's ``pipeline_config``.
        source: folder or hub id of VAE, text encoder and tokenizer.

    Raises:
        WeightsError: the VAE of ``source`` is missing or damaged, or does not fit a role.
    """

    blocks = "blocks"
    pipeline_batches_guidance = True

    def __init__(
        self,
        bundle: ModelBundle,
        family: DiffusersFamily[LongCatPipelineConfig],
        config: LongCatPipelineConfig,
        *,
        source: str,
    ) -> None:
        self._config = config
        self._text = umt5_encoders(
            source,
            length=config.max_sequence_length,
            precision=config.text_encoder_precision,
            device=device_of(bundle),
        )
        super().__init__(
            bundle,
            family,
            config,
            source=source,
            statistics=LatentStatistics.of_config(source),
            encoders=self._text,
        )

    @property
    def images(self) -> ImageConditioning:
        """This adapter: first frames may be given."""
        return self

    # -- model calls --------------------------------------------------------------------------

    def predict_velocity(
        self,
        role: RoleHandle,
        module: str,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        call: VelocityCall,
    ) -> Tensor:
        """See ``FlowMatchingAdapter.predict_velocity``.

        v of one given frame is what the model makes of it; of several it is 0, which leaves them
        out of the scale of CFG-zero. Neither is read otherwise.
        """
        tensors = read_condition(cond, self.condition_rows, x_t.device)
        text, mask = tensors[TEXT], tensors[TEXT_MASK]
        given = read_given_latents(cond, GIVEN, x_t, self._latent_shape[1])
        if given is None:
            return call_transformer(role, x_t, t, text, mask).float()
        count, frames = given.shape[2], (range(x_t.shape[2]),)
        times = frame_times(t, frames, count)
        if count > 1 and call.like_pipeline:
            past, free = _read_once(role, given, call), x_t[:, :, count:].contiguous()
            rest = call_transformer(role, free, times[:, count:], text, mask, past=past)
            return torch.cat([torch.zeros_like(given), rest.float()], dim=2)
        clip = insert_frames(x_t, given, frames)
        v = call_transformer(role, clip, times, text, mask, given_frames=count).float()
        return v if count == 1 else v * predicted_frames(given, x_t.shape[2])

    def combine_guidance(
        self, cond: Tensor, uncond: Tensor, w: float, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """Guide from the unconditional prediction as CFG-zero scales it."""
        return super().combine_guidance(cond, scale_to(uncond, cond), w, x_t, t)

    def insert_given_frames(
        self, role: RoleHandle, x: Tensor, cond: Condition, first_frame: int = 0
    ) -> Tensor:
        """Put the frames that ``cond`` gives, if any, in the place of predicted ones."""
        given = read_given_latents(cond.expand(len(x)), GIVEN, x, self._latent_shape[1])
        frames = (range(first_frame, first_frame + x.shape[2]),)
        return x if given is None else insert_frames(x, given, frames)

    # -- latents and conditions ---------------------------------------------------------------

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """Compute z / (1 / std) + mean per channel, which rounds as the original does."""
        return self._statistics.denormalize_by_inverse(latents)

    def encode_condition(self, raw_cond: Sequence[str]) -> Condition:
        """Encode prompts as the original does: UMT5 does not attend to the padding, and the
        transformer hides it (``text_tokens_zero_pad``)."""
        length = self._config.max_sequence_length
        text, mask = self._text.embed(clean_prompts(raw_cond), length, attend_padding=False)
        return Condition({TEXT: text, TEXT_MASK: mask})

    def trained_frames(self, cond: Condition, frames: int | None = None) -> Tensor | None:
        """Return 0 on the frames that ``cond`` gives; None where it gives none."""
        given = cond.tensors.get(GIVEN)
        if given is None:
            return None
        return predicted_frames(given, self._latent_shape[1] if frames is None else frames)

    @torch.no_grad()
    def with_image(
        self,
        cond: Condition,
        images: Tensor,
        frames: int | None = None,
        last: Tensor | None = None,
    ) -> Condition:
        """See ``ImageConditioning.with_image``. The original draws from what the VAE gives of
        frames (``latent_dist.sample``); here it is the mode, the same for each run."""
        readable = frame_conditions(self.frames_a_latent)
        pixels = self.given_pixels(readable, len(cond), images, frames, last)
        raw = self._codec.encode_each(pixels.first)
        # In the original's order of operations.
        given = self._statistics.normalize_by_inverse(raw)
        return Condition({GIVEN: given}).merged_onto(cond)


def _read_once(role: RoleHandle, given: Tensor, call: VelocityCall) -> tuple[KeysAndValues, ...]:
    """Read given frames, once in all calls of a sampler that are made without gradient."""
    if call.kept is None or torch.is_grad_enabled():
        return read_frames(role, given)
    if "past" not in call.kept:
        call.kept["past"] = read_frames(role, given)
    return cast(tuple[KeysAndValues, ...], call.kept["past"])


def scale_to(uncond: Tensor, cond: Tensor) -> Tensor:
    """Scale the unconditional velocity, a sample at a time, to be nearest to the conditional one:
    ``s u`` with ``s = c.u / (u.u + 1e-8)`` (CFG-Zero*, Fan et al. 2025, arXiv 2503.18886).

    Args:
        uncond, cond: u and c [B, ...], fp32.
    """
    u, c = uncond.flatten(1), cond.flatten(1)
    scale = (c * u).sum(dim=1) / (u.square().sum(dim=1) + 1e-8)
    return uncond * scale.view(-1, *[1] * (uncond.dim() - 1))
