"""How an LTX-2 model is called: packed tokens of pictures and of sound, a text for each, and
guidance of several parts.

Without sound (``audio: false``) the transformer gets one empty token of it and is called with
``isolate_modalities``: the pictures see nothing of the sound then, and what is left of its half is
of no effect. Lightricks' trainer leaves the sound out in the same way.

Letters: B batch, C channels, T latent frames, H and W latent height and width, L text tokens, S
latent frames of sound, M frequency bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill_diffusers.adapter import VelocityCall, device_of
from distill_diffusers.calls.conditions import read_condition
from distill_diffusers.calls.flow import rescale_guidance, sigma_of
from distill_diffusers.calls.precision import call_in_precision
from distill_diffusers.calls.tokens import pack, unpack
from distill_diffusers.components.statistics import LatentStatistics
from distill_diffusers.family import DiffusersFamily
from distill_diffusers.family_adapter import FamilyAdapter
from distill_protocols import (
    DTYPES,
    Condition,
    JointLatents,
    LatentParts,
    LatentShape,
    LatentsT,
    ModelBundle,
    PartShapes,
    RoleHandle,
    cut_parts,
    flatten_parts,
    restore_parts,
)
from torch import Tensor

from distill_adapters_ltx2.config import LTX2PipelineConfig
from distill_adapters_ltx2.kind import (
    AUDIO,
    AUDIO_TEXT,
    AUDIO_VAE,
    LTX2,
    TEXT,
    TEXT_MASK,
    VIDEO,
    part_shapes,
)
from distill_adapters_ltx2.published import SOUND_CHANNELS
from distill_adapters_ltx2.text import ConnectedEncoders


class Ltx2Adapter(FamilyAdapter):
    """``DistillAdapter`` of LTX-2, and ``JointLatents`` where clips have sound.

    A condition is ``text`` [B, L, D], ``text_mask`` [B, L] and, with sound, ``audio_text``
    [B, L, D'].

    Args:
        bundle: roles, each with a module ``transformer`` or, of a discriminator, ``heads``.
        family: ``PLUGIN``.
        config: the run's ``pipeline_config``.
        source: Diffusers folder or hub id of VAEs, text encoder, tokenizer and connectors.

    Raises:
        WeightsError: a VAE of ``source`` is missing or damaged, or does not fit a role.
    """

    pipeline_batches_guidance = True
    block_output = 0

    def __init__(
        self,
        bundle: ModelBundle,
        family: DiffusersFamily[LTX2PipelineConfig],
        config: LTX2PipelineConfig,
        *,
        source: str,
    ) -> None:
        device = device_of(bundle)
        self._config = config
        self._text = ConnectedEncoders(
            source,
            dtype=DTYPES[config.text_encoder_precision],
            length=config.max_sequence_length,
            settings=family.text_settings(config),
            device=device,
        )
        super().__init__(
            bundle,
            family,
            config,
            source=source,
            statistics=LatentStatistics.of_buffers(source),
            encoders=self._text,
        )
        self._sound: LatentStatistics | None = None
        if config.audio:
            shape = (1, SOUND_CHANNELS, 1, 1, -1)
            self._sound = LatentStatistics.of_buffers(source, AUDIO_VAE, shape).to(device)

    # -- sound --------------------------------------------------------------------------------

    @property
    def parts(self) -> JointLatents | None:
        """This adapter, where clips have sound."""
        return self if self._config.audio else None

    def part_shapes(self, main: LatentShape) -> PartShapes:
        """See ``JointLatents.part_shapes``."""
        return part_shapes(main, self.transformer, self._config)

    @property
    def part_weights(self) -> Mapping[str, float]:
        """See ``JointLatents.part_weights``."""
        return {VIDEO: 1.0, AUDIO: self._config.audio_weight}

    def normalize_latents(self, latents: LatentsT) -> LatentsT:
        """See ``LatentCodec.normalize_latents``; each part by its own VAE's statistics, and one
        tensor as pictures."""
        if self._sound is None or not isinstance(latents, LatentParts):
            return super().normalize_latents(latents)
        sound = (latents.tensors[AUDIO].float() - self._sound.mean) / self._sound.std
        both = {VIDEO: self._normalize(latents.tensors[VIDEO]), AUDIO: sound}
        return restore_parts(flatten_parts(LatentParts(both)), latents)

    # -- calls --------------------------------------------------------------------------------

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
        return self._call(role, x_t, t, cond, call.parts)

    def guide_calls(
        self,
        role: RoleHandle,
        conditional: Tensor,
        unconditional: Tensor,
        w: float,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        call: VelocityCall,
    ) -> Tensor:
        """Combine up to four calls on clean latents, in the order of operations of
        ``LTX2Pipeline``::

            x = c + (w - 1) (c - u) + s (c - skipped) + (m - 1) (c - isolated)
            x = phi x std(c) / std(x) + (1 - phi) x

        c, u ... are x0 of the calls, the standard deviations over a sample's part.
        """
        config, cond = self._config, cond.expand(len(x_t))
        scales: list[float] = []
        calls = [x_t, conditional, unconditional]
        if config.stg_scale > 0:
            scales.append(config.stg_scale)
            calls.append(self._call(role, x_t, t, cond, call.parts, stg_blocks=config.stg_blocks))
        if config.modality_scale > 1:
            scales.append(config.modality_scale - 1)
            calls.append(self._call(role, x_t, t, cond, call.parts, isolate=True))
        columns = [as_tokens(_split(tensor, call.parts)) for tensor in calls]
        sigma = sigma_of(t.to(x_t.device), x_t).flatten(1)[..., None]  # [B, 1, 1]
        audio_w = w if config.audio_guidance is None else config.audio_guidance
        guided: dict[str, Tensor] = {}
        for part, own_w in ((VIDEO, w), (AUDIO, audio_w))[: len(columns[0])]:
            x, *velocities = (column[part] for column in columns)
            c, u, *others = (x - v * sigma for v in velocities)
            clean = c + (own_w - 1) * (c - u)
            for scale, other in zip(scales, others, strict=True):
                clean = clean + scale * (c - other)
            if config.guidance_rescale > 0:
                clean = rescale_guidance(clean, c, config.guidance_rescale)
            guided[part] = (x - clean) / sigma
        return _join(as_latents(guided, _split(x_t, call.parts)), call.parts)

    def _call(
        self,
        role: RoleHandle,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        parts: PartShapes | None,
        *,
        stg_blocks: Sequence[int] = (),
        isolate: bool = False,
    ) -> Tensor:
        made = call_transformer(
            role,
            _split(x_t, parts),
            t.to(x_t.device),
            read_condition(cond, self.condition_rows, x_t.device),
            frame_rate=self._config.frame_rate,
            stg_blocks=stg_blocks,
            isolate=isolate,
        )
        return _join(made, parts).float()

    # -- layout and text ----------------------------------------------------------------------

    def to_model_layout(self, latents: Tensor) -> Tensor:
        """Cut latents of pictures into tokens [B, T H W, C]."""
        return pack(latents)

    def from_model_layout(self, latents: Tensor) -> Tensor:
        """Put tokens of one of the run's clips together."""
        return unpack(latents, self.latent_shape[1:])

    def encode_condition(self, raw_cond: Sequence[str]) -> Condition:
        """Encode prompts by Gemma and the connectors."""
        texts = self._text.encode(raw_cond)
        return Condition({name: texts[name] for name in self.condition_rows})


def call_transformer(
    role: RoleHandle,
    latents: Mapping[str, Tensor],
    t: Tensor,
    texts: Mapping[str, Tensor],
    *,
    frame_rate: float,
    stg_blocks: Sequence[int] = (),
    isolate: bool = False,
) -> LatentParts:
    """Return v of the parts of x_t, in the precision of the role.

    Args:
        latents: ``video`` [B, C, T, H, W] and, with sound, ``audio`` [B, C', S, 1, M].
        t: [B].
        texts: the tensors of a condition.
        frame_rate: frames a second.
        stg_blocks: blocks whose self-attention gives its values as they are.
        isolate: whether pictures and sound do not see each other.
    """
    video, tokens, times = latents[VIDEO], as_tokens(latents), t.float()
    module: Any = role.modules[LTX2.modules[0]]
    config, mask, frames = module.config, texts[TEXT_MASK], video.shape[2:]
    audio, audio_text, audio_mask = tokens.get(AUDIO), texts.get(AUDIO_TEXT), mask
    if audio is None or audio_text is None:
        # One empty token and an empty text: what comes of them reaches nothing.
        projects, width = config.use_prompt_embeddings, config.audio_cross_attention_dim
        audio = video.new_zeros(len(video), 1, config.audio_in_channels)
        audio_text = video.new_zeros(len(video), 1, config.caption_channels if projects else width)
        audio_mask, isolate = None, True
    with call_in_precision(role, LTX2.modules[0], LTX2, video.device) as dtype:
        made = module(
            hidden_states=tokens[VIDEO].to(dtype),
            audio_hidden_states=audio.to(dtype),
            encoder_hidden_states=texts[TEXT].to(dtype),
            audio_encoder_hidden_states=audio_text.to(dtype),
            timestep=times,
            sigma=times,
            encoder_attention_mask=mask,
            audio_encoder_attention_mask=audio_mask,
            **dict(zip(("num_frames", "height", "width"), frames, strict=True)),
            fps=frame_rate,
            audio_num_frames=audio.shape[1],
            isolate_modalities=isolate,
            spatio_temporal_guidance_blocks=list(stg_blocks) or None,
            use_cross_timestep=True,
            return_dict=False,
        )
    return as_latents(dict(zip((VIDEO, AUDIO), made, strict=True)), latents)


def as_tokens(latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut parts into tokens [B, L, C], of sound [B, S, C M]; in memory as the pipeline has them: a
    deviation of them rounds by their order."""
    tokens = {VIDEO: pack(latents[VIDEO]).contiguous()}
    if AUDIO in latents:
        tokens[AUDIO] = latents[AUDIO].squeeze(3).transpose(1, 2).flatten(2)
    return tokens


def as_latents(tokens: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> LatentParts:
    """Put tokens together to the parts that ``like`` has, of its shapes."""
    made = {VIDEO: unpack(tokens[VIDEO], like[VIDEO].shape[2:])}
    if AUDIO in like:
        sound = tokens[AUDIO].unflatten(2, (-1, like[AUDIO].shape[4]))
        made[AUDIO] = sound.transpose(1, 2).unsqueeze(3)
    return LatentParts(made)


def _split(x: Tensor, parts: PartShapes | None) -> Mapping[str, Tensor]:
    return {VIDEO: x} if parts is None else cut_parts(x, parts).tensors


def _join(latents: LatentParts, parts: PartShapes | None) -> Tensor:
    return latents.main if parts is None else flatten_parts(latents)
