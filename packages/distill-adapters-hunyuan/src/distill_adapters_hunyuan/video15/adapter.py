"""How a HunyuanVideo 1.5 model is called: from text, or from text and a first frame.

What is true of any flow-matching model is in ``distill_diffusers.adapter``.

Letters: B batch, C channels, T latent frames, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from distill_diffusers.adapter import VelocityCall, device_of
from distill_diffusers.calls.conditions import read_condition
from distill_diffusers.components.codec import VideoCodec
from distill_diffusers.components.encoders import TextEncoders
from distill_diffusers.components.images import SIGLIP, ImageEncoder
from distill_diffusers.family import DiffusersFamily
from distill_diffusers.fingerprints import image_fingerprint
from distill_diffusers.images import ScaledLatentsAdapter
from distill_protocols import (
    Condition,
    ConditioningError,
    Fingerprint,
    FrameConditions,
    GivenFrames,
    ImageConditioning,
    ModelBundle,
    RoleHandle,
    WeightsError,
)
from torch import Tensor

from distill_adapters_hunyuan.video15.calling import call_transformer
from distill_adapters_hunyuan.video15.config import HunyuanVideo15Config
from distill_adapters_hunyuan.video15.kind import (
    FROM_IMAGE,
    IMAGE_EMBEDS,
    IMAGE_LATENTS,
    PIPELINE,
    image_shapes,
    reads_image,
)
from distill_adapters_hunyuan.video15.text import encode_prompts, text_parts


class HunyuanVideo15Codec(VideoCodec):
    """The VAE, called with one clip: the mask of its attention (diffusers 0.42.1) fits no more."""

    def encode_part(self, vae: Any, pixels: Tensor) -> Tensor:
        return torch.cat([VideoCodec.encode_part(self, vae, clip) for clip in pixels.split(1)])

    def decode_part(self, vae: Any, latents: Tensor) -> Tensor:
        return torch.cat([VideoCodec.decode_part(self, vae, clip) for clip in latents.split(1)])


class HunyuanVideo15Adapter(ScaledLatentsAdapter):
    """``DistillAdapter`` and ``ImageConditioning`` of HunyuanVideo 1.5; see ``video15.kind`` for
    the tensors of a condition.

    Args:
        bundle: roles, each with a module ``transformer`` or, of a discriminator, ``heads``.
        family: ``PLUGIN``.
        config: the run's ``pipeline_config``.
        source: Diffusers folder or hub id of VAE, text encoders, tokenizers and image encoder.

    Raises:
        WeightsError: the VAE of ``source`` is missing or damaged, or does not fit a role; or some
            roles read a first frame, and others none.
    """

    block_output = 0
    codec_class = HunyuanVideo15Codec

    def __init__(
        self,
        bundle: ModelBundle,
        family: DiffusersFamily[HunyuanVideo15Config],
        config: HunyuanVideo15Config,
        *,
        source: str,
    ) -> None:
        self._config = config
        device = device_of(bundle)
        self._text = TextEncoders(
            source,
            text_parts(config.text_encoder_precision),
            settings=family.text_settings(config),
            device=device,
        )
        super().__init__(bundle, family, config, source=source, encoders=self._text)
        kinds = {role.call_options[PIPELINE] == FROM_IMAGE for role in self.models.values()}
        if len(kinds) > 1:
            raise WeightsError(
                f"of the roles {', '.join(self.models)} some read a first frame and others none, "
                "and one condition goes to all of them. Use models of one kind"
            )
        self._reads_image = kinds.pop() if kinds else reads_image(family.describe(source))
        self._image_encoder = ImageEncoder(source, SIGLIP, device=device)

    @property
    def images(self) -> ImageConditioning:
        """This adapter: a model may read a first frame."""
        return self

    def predict_velocity(
        self,
        role: RoleHandle,
        module: str,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        call: VelocityCall,
    ) -> Tensor:
        """See ``FlowMatchingAdapter.predict_velocity``."""
        tensors = read_condition(cond, self._read_rows(cond, x_t), x_t.device)
        return call_transformer(role, x_t, t, **tensors, next_t=call.next_t).float()

    def _read_rows(self, cond: Condition, x_t: Tensor) -> Mapping[str, tuple[int, ...]]:
        """Give the shapes of what a call on x_t reads of ``cond``.

        Raises:
            ConditioningError: a picture that no model of the run reads.
        """
        if self._reads_image:
            channels, frames, height, width = x_t.shape[1:]
            pictures = image_shapes(self.transformer, (channels, frames, height, width))
            return {**self.condition_rows, **pictures}
        if IMAGE_LATENTS in cond.tensors:
            raise ConditioningError(_reads_text_alone)
        return self.condition_rows

    # -- first frames ---------------------------------------------------------------------------

    def trained_frames(self, cond: Condition, frames: int | None = None) -> Tensor | None:
        """Return None: a picture has channels of its own, and every frame is predicted."""
        return None

    @torch.no_grad()
    def with_image(
        self,
        cond: Condition,
        images: Tensor,
        frames: int | None = None,
        last: Tensor | None = None,
    ) -> Condition:
        """Add to ``cond`` what the models read of first frames [B, 3, H_px, W_px] in [0, 1].

        Args:
            frames: of no effect, as only the first is encoded.

        Raises:
            ConditioningError: the models read none, or no last frame; pictures are of another size
                than the run's clips, or there is not one for each row of ``cond``.
            WeightsError: the source has no image encoder.
        """
        if not self._reads_image:
            raise ConditioningError(_reads_text_alone)
        given = GivenFrames(first=1, last=last is not None)
        if (problem := FrameConditions(first="always").problem(given)) is not None:
            raise ConditioningError(problem)
        sizes = dict.fromkeys((len(cond), 3, *clip[1:]) for clip in self._clip_shapes)
        if tuple(images.shape) not in sizes:
            raise ConditioningError(
                f"first frames are {list(images.shape)}, they must be "
                f"{' or '.join(map(str, map(list, sizes)))}: one a row of the condition, of the "
                "size of the run's clips. Scale and crop them before"
            )
        pixels = images.to(self._statistics.mean.device).float().unsqueeze(2)
        # One at a time, as the pipeline does: together they round otherwise.
        raw = torch.cat([self._codec.encode(frame) for frame in pixels.split(1)])
        embeds = self._image_encoder.encode(images)
        tensors = {IMAGE_LATENTS: raw * self._factor, IMAGE_EMBEDS: embeds.float()}
        return Condition(tensors).merged_onto(cond)

    # -- conditions -----------------------------------------------------------------------------

    def encode_condition(self, raw_cond: Sequence[str]) -> Condition:
        """Encode prompts as ``HunyuanVideo15Pipeline.encode_prompt`` does."""
        return encode_prompts(
            self._text,
            raw_cond,
            length=self._config.max_sequence_length,
            glyphs=self._config.glyph_sequence_length,
        )

    def condition_fingerprint(self) -> Fingerprint:
        """Name both text encoders, tokenizers and settings, and an encoder of first frames."""
        return {**super().condition_fingerprint(), **image_fingerprint(self._codec.source)}


_reads_text_alone = (
    "there is a first frame, but the models of this run read text alone; it would have no effect. "
    "Leave it out, or use an image-to-video model"
)
