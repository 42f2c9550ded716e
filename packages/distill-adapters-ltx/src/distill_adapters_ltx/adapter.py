"""How an LTX-Video model is called: packed tokens, a masked text, given frames, guidance as its
pipelines have it.

What is true of any flow-matching model is in ``distill_diffusers.adapter``. Two kinds of pipelines
call the same transformer:

========================  ====================================  ==================================
                          ``LTXPipeline``,                      ``LTXConditionPipeline``
                          ``LTXImageToVideoPipeline``
========================  ====================================  ==================================
time of latent frame i    8 i / frame rate                      (8 i - 7) / frame rate, 0 of the
                                                                first: its first pixel frame
T5 and the padding        attends to it                         does not
first frames              in the place of noise, with t = 0     the same
last frame                                                      tokens of a clean frame before the
                                                                clip's, at the last one's position
========================  ====================================  ==================================

Letters: B batch, C channels, T latent frames, K given ones, H and W latent height and width, L text
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from distill_diffusers.adapter import VelocityCall, device_of
from distill_diffusers.calls.conditions import read_condition
from distill_diffusers.calls.flow import rescale_guidance
from distill_diffusers.calls.given_frames import (
    frame_times,
    insert_frames,
    predicted_frames,
    read_given_latents,
)
from distill_diffusers.calls.precision import call_in_precision
from distill_diffusers.calls.tokens import pack, unpack
from distill_diffusers.components.encoders import TextEncoders
from distill_diffusers.components.statistics import LatentStatistics
from distill_diffusers.family import DiffusersFamily
from distill_diffusers.family_adapter import FamilyAdapter
from distill_protocols import (
    Condition,
    ConditioningError,
    Fingerprint,
    ImageConditioning,
    ModelBundle,
    RoleHandle,
    WeightsError,
)
from torch import Tensor

from distill_adapters_ltx.codec import LtxCodec
from distill_adapters_ltx.config import LTXPipelineConfig
from distill_adapters_ltx.kind import (
    CONDITION,
    FIRST,
    LAST,
    LTX,
    PIPELINE,
    PLAIN,
    TEXT,
    TEXT_MASK,
    frame_conditions,
    padding_entry,
)
from distill_adapters_ltx.published import STRIDE_HW, STRIDE_T


class LtxAdapter(FamilyAdapter):
    """``DistillAdapter`` and ``ImageConditioning`` of LTX-Video.

    A condition is ``text`` [B, L, D], ``text_mask`` [B, L] and, where frames are given,
    ``image_latents`` [B, C, K, H, W] of the first ones and ``last_latents`` [B, C, 1, H, W], both
    normalised.

    Args:
        bundle: roles, each with a module ``transformer`` or, of a discriminator, ``heads``.
        family: ``PLUGIN``.
        config: the run's ``pipeline_config``.
        source: Diffusers folder or hub id of VAE, text encoder and tokenizer.

    Raises:
        WeightsError: the VAE of ``source`` is missing or damaged, or does not fit a role; or the
            roles are models of two kinds of pipelines.
    """

    pipeline_batches_guidance = True

    def __init__(
        self,
        bundle: ModelBundle,
        family: DiffusersFamily[LTXPipelineConfig],
        config: LTXPipelineConfig,
        *,
        source: str,
    ) -> None:
        device = device_of(bundle)
        self._config = config
        self._text = TextEncoders.single(
            source,
            "transformers.models.t5.modeling_t5:T5EncoderModel",
            length=config.max_sequence_length,
            precision=config.text_encoder_precision,
            device=device,
        )
        super().__init__(
            bundle,
            family,
            config,
            source=source,
            statistics=LatentStatistics.of_buffers(source),
            encoders=self._text,
            codec=LtxCodec(source, config, device=device),
        )
        options = [role.call_options for role in self.models.values()]
        if not options:  # as when data are made
            options = [family.describe(source).call_options]
        pipelines = {one.get(PIPELINE, PLAIN) for one in options}
        if len({one == CONDITION for one in pipelines}) > 1:
            raise WeightsError(
                f"the roles are models of {' and '.join(sorted(map(str, pipelines)))}, which give "
                "the transformer other positions and other text embeddings. Use models of one kind"
            )
        self._pipeline = next(iter(pipelines))

    @property
    def images(self) -> ImageConditioning:
        """This adapter: each model may be given frames."""
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
        """See ``FlowMatchingAdapter.predict_velocity``; positions are in seconds."""
        tensors = read_condition(cond, self.condition_rows, x_t.device)
        first = read_given_latents(cond, FIRST, x_t, self.latent_shape[1])
        if first is not None:
            frames = (range(x_t.shape[2]),)
            t = frame_times(t, frames, first.shape[2])
            x_t = insert_frames(x_t, first, frames)
        return call_transformer(
            role,
            x_t,
            t,
            **tensors,
            last=self._read_last(cond, x_t),
            frame_rate=self._config.frame_rate,
            pipeline=self._pipeline,
        ).float()

    def _read_last(self, cond: Condition, x_t: Tensor) -> Tensor | None:
        last = read_given_latents(cond, LAST, x_t, self.latent_shape[1])
        if last is not None and (self._pipeline != CONDITION or last.shape[2] != 1):
            raise ConditioningError(
                f"{LAST} of {last.shape[2]} latent frames, and models of {self._pipeline} read "
                f"{'one' if self._pipeline == CONDITION else 'none'}. Make the condition with "
                "adapter.with_image of this model"
            )
        return last

    # -- given frames -------------------------------------------------------------------------

    def trained_frames(self, cond: Condition, frames: int | None = None) -> Tensor | None:
        """Return 0 on the first frames that ``cond`` gives; a last frame is predicted all the same.

        Raises:
            ConditioningError: all frames of the clip are given.
        """
        first = cond.tensors.get(FIRST)
        if first is None:
            return None
        return predicted_frames(first, self.latent_shape[1] if frames is None else frames)

    def insert_given_frames(
        self, role: RoleHandle, x: Tensor, cond: Condition, first_frame: int = 0
    ) -> Tensor:
        """Put the first frames that ``cond`` gives, if any, in the place of predicted ones."""
        first = read_given_latents(cond.expand(len(x)), FIRST, x, self.latent_shape[1])
        return x if first is None else insert_frames(x, first, (range(x.shape[2]),))

    @torch.no_grad()
    def with_image(
        self,
        cond: Condition,
        images: Tensor,
        frames: int | None = None,
        last: Tensor | None = None,
    ) -> Condition:
        """See ``ImageConditioning.with_image``.

        Latents are the posterior's mean, as those of the clips are; the pipelines draw from it.
        """
        readable = frame_conditions(self._pipeline)
        given = self.given_pixels(readable, len(cond), images, frames, last)
        tensors = {FIRST: self.normalize_latents(self._codec.encode_each(given.first))}
        if given.last is not None:
            tensors[LAST] = self.normalize_latents(self._codec.encode_each(given.last))
        return Condition(tensors).merged_onto(cond)

    # -- guidance, layout and text ------------------------------------------------------------

    def combine_guidance(
        self, cond: Tensor, uncond: Tensor, w: float, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """Guide and rescale, as ``LTXPipeline`` does; see ``rescale_guidance``."""
        guided = super().combine_guidance(cond, uncond, w, x_t, t)
        factor = self._config.guidance_rescale
        return rescale_guidance(guided, cond, factor) if factor > 0 else guided

    def to_model_layout(self, latents: Tensor) -> Tensor:
        """Cut latents into tokens [B, L, C]."""
        return pack(latents)

    def from_model_layout(self, latents: Tensor) -> Tensor:
        """Put tokens of one of the run's clips together."""
        return unpack(latents, self.latent_shape[1:])

    def encode_condition(self, raw_cond: Sequence[str]) -> Condition:
        """Encode prompts as ``encode_prompt`` of the pipeline does; the transformer does not read
        the padding."""
        text, mask = self._text.embed(
            raw_cond,
            self._config.max_sequence_length,
            attend_padding=self._pipeline != CONDITION,
        )
        return Condition({TEXT: text, TEXT_MASK: mask})

    def condition_fingerprint(self) -> Fingerprint:
        """Name T5, its tokenizer and settings, and whether it attends to the padding."""
        fingerprint = super().condition_fingerprint()
        return {**fingerprint, **padding_entry(self._pipeline)} if fingerprint else fingerprint


def call_transformer(
    role: RoleHandle,
    latents: Tensor,
    t: Tensor,
    text: Tensor,
    text_mask: Tensor,
    *,
    last: Tensor | None = None,
    frame_rate: float,
    pipeline: object = PLAIN,
) -> Tensor:
    """Return v of x_t, both [B, C, T, H, W], in the precision of the role.

    Args:
        latents: x_t.
        t: [B], or [B, T], one a frame.
        text: [B, L, D].
        text_mask: [B, L], 1 at tokens that are attended to.
        last: clean latents of the last frame [B, C, 1, H, W], where it is given.
        frame_rate: frames a second.
        pipeline: whose positions the tokens have.
    """
    frames, height, width = size = (latents.shape[2], latents.shape[3], latents.shape[4])
    positions = token_positions(size, frame_rate, device=latents.device, pipeline=pipeline)
    hidden, times = pack(latents), t.float()
    cells = height * width
    if times.dim() == 2:
        times = times.repeat_interleave(cells, dim=1)
    if last is not None:
        # Tokens of their own, before those of the clip: the clip's last latent frame is made.
        hidden = torch.cat([pack(last), hidden], dim=1)
        each = times if times.dim() == 2 else times[:, None].expand(-1, frames * cells)
        times = torch.cat([each.new_zeros(len(each), cells), each], dim=1)
        end = last_positions(size, frame_rate, device=latents.device)
        positions = torch.cat([end, positions], dim=2)
    with call_in_precision(role, LTX.modules[0], LTX, latents.device) as dtype:
        (tokens,) = role.modules[LTX.modules[0]](
            hidden_states=hidden.to(dtype),
            encoder_hidden_states=text.to(dtype),
            timestep=times,
            encoder_attention_mask=text_mask,
            num_frames=frames,
            height=height,
            width=width,
            video_coords=positions.expand(len(latents), -1, -1),
            return_dict=False,
        )
    return unpack(tokens[:, -frames * cells :], size)


def token_positions(
    size: tuple[int, int, int],
    frame_rate: float,
    *,
    device: torch.device,
    pipeline: object = PLAIN,
) -> Tensor:
    """Compute time (s), height and width (pixels) of each token: ``video_coords`` [1, 3, L], fp32.

    The first latent frame holds one frame, every other eight. ``LTXPipeline`` counts eight for the
    first as well: latent frame i is at frame 8 i. In ``LTXConditionPipeline`` it is where its first
    frame is: 8 i - 7, and 0 of the first.

    Args:
        size: T, H and W of the latents.
        frame_rate: frames a second.
        pipeline: whose positions they are.
    """
    frames, height, width = (torch.arange(n, dtype=torch.float32, device=device) for n in size)
    if pipeline == CONDITION:
        # The order of both products is that of the pipelines, to the last bit.
        seconds = (frames * STRIDE_T + (1 - STRIDE_T)).clamp(min=0) * (1.0 / frame_rate)
    else:
        seconds = frames * (STRIDE_T / frame_rate)
    grid = torch.meshgrid(seconds, height * STRIDE_HW, width * STRIDE_HW, indexing="ij")
    return torch.stack(grid).flatten(1)[None]


def last_positions(
    size: tuple[int, int, int], frame_rate: float, *, device: torch.device
) -> Tensor:
    """Compute the positions of the last pixel frame's tokens, [1, 3, H W], of clips of ``size``."""
    frames, height, width = size
    positions = token_positions((1, height, width), frame_rate, device=device)
    positions[:, 0] = (frames - 1) * STRIDE_T
    positions[:, 0] *= 1.0 / frame_rate
    return positions
