"""How a Wan model is called: from text or from given frames, with one expert or two.

What is true of any flow-matching model is in ``distill_diffusers.adapter``. Here are the checks of
Wan's conditions, given frames, experts, causal roles and times for each frame.

Letters: B batch, C channels, T latent frames, H and W latent height and width, L tokens, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

import torch
from distill_diffusers.adapter import VelocityCall, checked_rollout, device_of
from distill_diffusers.calls.conditions import read_condition
from distill_diffusers.calls.features import Features
from distill_diffusers.calls.given_frames import (
    frame_times,
    insert_frames,
    predicted_frames,
    read_given_latents,
)
from distill_diffusers.components.images import ImageEncoder
from distill_diffusers.components.statistics import LatentStatistics
from distill_diffusers.family import DiffusersFamily
from distill_diffusers.family_adapter import FamilyAdapter, transformer_config
from distill_diffusers.fingerprints import image_fingerprint
from distill_diffusers.kinds import EXPERTS
from distill_diffusers.sampling import sampler
from distill_protocols import (
    CapabilityError,
    CausalRollout,
    Chunk,
    ChunkCall,
    Condition,
    ContractError,
    ExpertRouting,
    Fingerprint,
    ImageConditioning,
    LatentsT,
    ModelBundle,
    RoleHandle,
    RowGenerators,
    SamplerSpec,
    WeightsError,
    one_tensor,
    restore_parts,
)
from torch import Tensor

from distill_adapters_wan.calling import call_transformer, transformer_of
from distill_adapters_wan.causal.decoding import decode_chunks
from distill_adapters_wan.causal.kv_cache import Place
from distill_adapters_wan.causal.roles import CausalRoles, PreparedCall, token_times
from distill_adapters_wan.config import WanPipelineConfig
from distill_adapters_wan.experts import Experts, boundary_of, ranges, stated_ratio
from distill_adapters_wan.images.conditions import (
    frame_mask,
    read_image_channels,
    read_image_embeds,
    refuse_images,
)
from distill_adapters_wan.images.shapes import (
    EMBEDS,
    LATENTS,
    MASK,
    TEXT,
    ImageKind,
    frame_conditions,
    image_kind,
    reads_pairs,
)
from distill_adapters_wan.text import encode_text, wan_encoders


class WanAdapter(FamilyAdapter):
    """``DistillAdapter``, ``ExpertRouting``, ``ImageConditioning`` and ``CausalRollout`` of Wan.

    A condition is ``{"text": [B, L, D]}`` and, of a model that reads given frames, what
    ``distill_adapters_wan.images.conditions`` states.

    Args:
        bundle: roles, each with a module ``transformer``, and ``transformer_2`` where it has two
            experts; or, of a discriminator, ``heads``.
        family: ``PLUGIN``.
        config: the run's ``pipeline_config``.
        source: Diffusers folder or hub id of VAE, text encoder and tokenizer.

    Raises:
        WeightsError: ``source`` has no VAE configuration, or clip, VAE and transformer do not fit.
        RoleError: a role that ``config.causal`` names does not exist.
    """

    blocks = "blocks"

    def __init__(
        self,
        bundle: ModelBundle,
        family: DiffusersFamily[WanPipelineConfig],
        config: WanPipelineConfig,
        *,
        source: str,
    ) -> None:
        self._config = config
        device = device_of(bundle)
        encoders = wan_encoders(source, config, device=device)
        super().__init__(
            bundle,
            family,
            config,
            source=source,
            statistics=LatentStatistics.of_config(source),
            encoders=encoders,
        )
        _refuse_mixed_conditions(self.models)
        # Of the source where there are no roles, as when data are made.
        self._image_kind: ImageKind = next(
            map(_image_kind, self.models.values()), None
        ) or image_kind(self.transformer, family.describe(source).call_options["expand_timesteps"])
        self._text = encoders
        self._images = ImageEncoder(source, device=device)
        self._causal = CausalRoles(bundle, config.causal)
        self._streams = itertools.count()

    @property
    def causal(self) -> CausalRollout | None:
        """This adapter, where some role of the run is causal."""
        return None if self._config.causal is None else self

    @property
    def experts(self) -> ExpertRouting:
        """This adapter: a role may have two experts."""
        return self

    @property
    def images(self) -> ImageConditioning:
        """This adapter: a model may read given frames."""
        return self

    # -- model calls --------------------------------------------------------------------------

    def velocity(
        self,
        role: RoleHandle,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        call: VelocityCall,
        *,
        features: Features | None = None,
    ) -> Tensor:
        """See ``FlowMatchingAdapter.velocity``; a chunk becomes past for each expert."""
        if isinstance(call.caches, ChunkCall) and call.caches.store:
            # Each expert attends to keys of its own, so what becomes past becomes it for both.
            rows, times = cond.expand(x_t.shape[0]), t.to(x_t.device)
            with torch.no_grad():
                for other in sorted(role.transformers.keys() - {self.choose_module(role, t)}):
                    self.predict_velocity(role, other, x_t, times, rows, call)
        return super().velocity(role, x_t, t, cond, call, features=features)

    def predict_velocity(
        self,
        role: RoleHandle,
        module: str,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        call: VelocityCall,
    ) -> Tensor:
        """See ``FlowMatchingAdapter.predict_velocity``; of a causal role with its past."""
        text = read_condition(cond, self.condition_rows, x_t.device)[TEXT]
        transformer = transformer_of(role, module)
        stream = call.caches.stream if isinstance(call.caches, ChunkCall) else ""
        place = Place(role=role.name, module=module, negative=call.is_negative, stream=stream)
        tensors = tuple(cond.tensors[name] for name in sorted(cond.tensors))
        prepared = self._causal.prepare(place, x_t, t, tensors, call.caches, transformer)
        hidden, times = self._model_inputs(role, prepared, cond, like_pipeline=call.like_pipeline)
        v = call_transformer(
            role,
            hidden,
            times,
            text,
            read_image_embeds(cond, transformer.config, x_t),
            module=module,
            arguments=prepared.arguments,
        )
        return prepared.finish(v.float())

    def _model_inputs(
        self, role: RoleHandle, prepared: PreparedCall, cond: Condition, *, like_pipeline: bool
    ) -> tuple[Tensor, Tensor]:
        """Put given frames where the model reads them; times are [B], or one a token."""
        kind, x_t, t, frames = _image_kind(role), prepared.x_t, prepared.t, prepared.frames
        transformer = transformer_of(role)
        if kind != "frame":
            times = token_times(transformer, x_t, t)
            if kind == "channels":
                return torch.cat([x_t, read_image_channels(cond, x_t, frames)], dim=1), times
            refuse_images(cond)
            return x_t, times
        given = read_given_latents(cond, LATENTS, x_t, self._latent_shape[1])
        if given is None:
            # WanPipeline gives such a model one t a token, always. Where nothing must repeat its
            # bits, a t that all tokens share gives the same to 4e-6, without a row of modulation
            # for each token.
            t = frame_times(t, frames, 0) if like_pipeline else t
            return x_t, token_times(transformer, x_t, t)
        times = token_times(transformer, x_t, frame_times(t, frames, given.shape[2]))
        return insert_frames(x_t, given, frames), times

    def insert_given_frames(
        self, role: RoleHandle, x: Tensor, cond: Condition, first_frame: int = 0
    ) -> Tensor:
        """Put the first frames that ``cond`` gives, if any, in the place of predicted ones."""
        if _image_kind(role) != "frame":
            return x
        given = read_given_latents(cond.expand(len(x)), LATENTS, x, self._latent_shape[1])
        frames = (range(first_frame, first_frame + x.shape[2]),)
        return x if given is None else insert_frames(x, given, frames)

    def check_features(self, role: RoleHandle, w: float) -> None:
        """See ``FlowMatchingAdapter.check_features``; a causal role has none either."""
        super().check_features(role, w)
        if self._causal.config_of(role.name) is not None:
            raise CapabilityError(
                f"features of role {role.name!r}, which is causal: a discriminator reads whole "
                "clips. Ask for those of a role that is not causal"
            )

    # -- experts ------------------------------------------------------------------------------

    def choose_module(self, role: RoleHandle, t: Tensor) -> str:
        """See ``Experts.module_at``."""
        return self._experts_of(role).module_at(t)

    def expert_of(self, role: str, t: Tensor) -> str:
        """Choose ``transformer`` where ``t`` reaches the boundary, else ``transformer_2``.

        Raises:
            ContractError: ``t`` lies on both sides of it, or the role does not have this expert.
        """
        return self.choose_module(self._bundle[role], t)

    def expert_ranges(self, *roles: str) -> tuple[tuple[float, float], ...]:
        """See ``ExpertRouting``: with ends at the boundaries of all of ``roles``."""
        experts = [self._experts_of(self._bundle[name]) for name in roles]
        found = ranges(role.boundary for role in experts if role.boundary is not None)
        owned = [tuple(role.ranges().values()) for role in experts]
        return tuple(
            (low, high)
            for low, high in found
            if all(any(a <= low and high <= b for a, b in own) for own in owned)
        )

    def _experts_of(self, role: RoleHandle) -> Experts:
        own = stated_ratio(role.call_options)
        # A role that was loaded with one of two experts has the times of that one alone.
        model = self._family.kind.modules if role.call_options.get(EXPERTS) else role.transformers
        boundary = boundary_of(model, own, self._config.boundary_ratio)
        return Experts(role=role.name, modules=role.transformers, boundary=boundary)

    # -- given frames -------------------------------------------------------------------------

    def trained_frames(self, cond: Condition, frames: int | None = None) -> Tensor | None:
        """Return 0 on the first frames where ``cond`` gives them as frames (TI2V-5B), else None.

        A picture in channels of its own (Wan 2.1 and A14B) leaves every frame to be predicted.

        Raises:
            ConditioningError: all frames of the clip are given.
        """
        given = cond.tensors.get(LATENTS)
        if given is None or self._image_kind != "frame":
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
        """See ``ImageConditioning.with_image``.

        Raises:
            ConditioningError: the models read no such frames, pictures are of another size than
                the run's clips, or there is not one for each row of ``cond``.
            WeightsError: Wan 2.1 reads CLIP's embedding, and the source has no image encoder.
        """
        readable = frame_conditions(self.transformer, self._image_kind, self.frames_a_latent)
        given = self.given_pixels(readable, len(cond), images, frames, last)
        first, end = given.first, given.last
        video = first if self._image_kind == "frame" else _with_grey(first, end, given.frames)
        raw = self._codec.encode_each(video)
        # As WanImageToVideoPipeline does.
        tensors = {LATENTS: self._statistics.normalize_by_inverse(raw)}
        if end is not None:
            mask = frame_mask(raw.shape[2]).to(raw.device)
            tensors[MASK] = mask.expand(len(raw), -1, -1)
        if self.transformer.get("image_dim") is not None:
            pictures = first if end is None else torch.cat([first, end], dim=2)
            tensors[EMBEDS] = self._images.encode(pictures.transpose(1, 2))
        return Condition(tensors).merged_onto(cond)

    # -- latents and conditions ---------------------------------------------------------------

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """Compute z / (1 / std) + mean per channel, which rounds as WanPipeline does."""
        return self._statistics.denormalize_by_inverse(latents)

    def encode_condition(self, raw_cond: Sequence[str]) -> Condition:
        """Encode to ``{"text": [B, L, D]}`` fp32, padded to L = max_sequence_length with zeros."""
        return Condition(
            {TEXT: encode_text(self._text, raw_cond, self._config.max_sequence_length)}
        )

    def condition_fingerprint(self) -> Fingerprint:
        """Name UMT5, its tokenizer and settings, and an encoder of pictures if there is one."""
        return {**super().condition_fingerprint(), **image_fingerprint(self._codec.source)}

    # -- causal roles -------------------------------------------------------------------------

    def chunks(self, role: str, frames: int | None = None) -> tuple[Chunk, ...]:
        """Divide a video as ``role`` does; see ``CausalRollout.chunks``."""
        return self._causal.chunks(role, self._latent_shape[1] if frames is None else frames)

    def clear_caches(self, role: str, *, stream: str | None = None) -> None:
        """Forget the past of ``role``: of one stream, or of all."""
        self._causal.clear(role, stream)

    def cached_bytes(self, role: str) -> int:
        """Count the bytes of keys and values that ``role`` has cached."""
        return self._causal.cached_bytes(role)

    def sample(
        self,
        role: str,
        spec: SamplerSpec,
        noise: LatentsT,
        cond: Condition,
        *,
        neg_cond: Condition | None = None,
        generators: RowGenerators | None = None,
        poll: Callable[[], None] | None = None,
        on_step: Callable[[int, LatentsT], None] | None = None,
    ) -> LatentsT:
        """See ``FlowMatchingAdapter.sample``; a causal role samples chunk by chunk (``stream``).

        Raises:
            ContractError: as there, or ``on_step`` for a causal role.
        """
        if self._causal.config_of(role) is None:
            return super().sample(
                role, spec, noise, cond,
                neg_cond=neg_cond, generators=generators, poll=poll, on_step=on_step,
            )  # fmt: skip
        _refuse_steps_of_a_causal_role(role, on_step)
        x = one_tensor(noise)
        self.check_clip_noise(x)
        chunks = (x[:, :, chunk.span] for chunk in self.chunks(role, x.shape[2]))
        clean = self.stream(
            role, spec, chunks, cond, neg_cond=neg_cond, generators=generators, poll=poll
        )
        return restore_parts(torch.cat(list(clean), dim=2), noise)

    def rollout(
        self,
        role: str,
        spec: SamplerSpec,
        noise: LatentsT,
        cond: Condition,
        *,
        exit_steps: Sequence[int],
        requires_grad: Sequence[bool] | None = None,
        generators: RowGenerators | None = None,
        poll: Callable[[], None] | None = None,
        on_step: Callable[[int, LatentsT], None] | None = None,
    ) -> LatentsT:
        """See ``Sampler.rollout``; the past of a causal role is that of stream "rollout".

        Raises:
            ContractError: as ``sample``, ``on_step`` of a causal role with it; a guided spec; or
                not one exit step and one ``requires_grad`` a chunk.
        """
        if self._causal.config_of(role) is None:
            return super().rollout(
                role, spec, noise, cond, exit_steps=exit_steps,
                requires_grad=requires_grad, generators=generators, poll=poll, on_step=on_step,
            )  # fmt: skip
        _refuse_steps_of_a_causal_role(role, on_step)
        x = one_tensor(noise)
        chunks = self.chunks(role, x.shape[2])
        gradients = checked_rollout(role, spec, exit_steps, requires_grad, chunks=len(chunks))
        handle, x = self._bundle[role], self.checked_noise(x)
        parts = (x[:, :, chunk.span] for chunk in chunks)
        velocity = self._chunk_velocity(handle, spec, cond, None, poll, ChunkCall.ROLLOUT)
        self.clear_caches(role, stream=ChunkCall.ROLLOUT)
        try:
            clean = sampler.sample_chunks(
                velocity, spec, parts, generators, exit_steps=exit_steps, requires_grad=gradients
            )
            clips = self.insert_given_frames(handle, torch.cat(list(clean), dim=2), cond)
            return restore_parts(clips, noise)
        finally:
            self.clear_caches(role, stream=ChunkCall.ROLLOUT)

    def extend(
        self,
        role: str,
        spec: SamplerSpec,
        noise: Tensor,
        cond: Condition,
        *,
        first_frame: int,
        stream: str,
        exit_steps: Sequence[int],
        requires_grad: Sequence[bool] | None = None,
        generators: RowGenerators | None = None,
        poll: Callable[[], None] | None = None,
    ) -> Tensor:
        """See ``CausalRollout.extend``.

        Raises:
            ContractError: as ``rollout``; or the frames are no whole chunks, or do not follow the
                past.
        """
        handle, x = self._bundle[role], self.checked_noise(noise)
        stop = first_frame + x.shape[2]
        chunks = [chunk for chunk in self.chunks(role, stop) if chunk.first >= first_frame]
        if not chunks or chunks[0].first != first_frame:
            raise ContractError(
                f"no chunk of role {role!r} begins at frame {first_frame}: a video is extended by "
                "whole chunks. Take the frames from adapter.chunks(role, frames)"
            )
        gradients = checked_rollout(role, spec, exit_steps, requires_grad, chunks=len(chunks))
        parts = x.split([chunk.frames for chunk in chunks], dim=2)
        velocity = self._chunk_velocity(handle, spec, cond, None, poll, stream)
        clean = sampler.sample_chunks(
            velocity, spec, parts, generators, exit_steps=exit_steps, requires_grad=gradients,
            first_frame=first_frame, stores_last=True,
        )  # fmt: skip
        return self.insert_given_frames(handle, torch.cat(list(clean), dim=2), cond, first_frame)

    @torch.no_grad()
    def rebuild_past(self, role: str, cond: Condition, *, stream: str) -> None:
        """See ``CausalRollout.rebuild_past``."""
        stored = self._causal.inputs(role, stream)
        self.clear_caches(role, stream=stream)
        for one in stored:
            call = ChunkCall(first_frame=one.chunk.first, store=True, stream=stream, after_gap=True)
            self.forward(role, one.x_t, one.t, cond, caches=call)

    def past_state(self, role: str, *, stream: str) -> Mapping[str, object]:
        """See ``CausalRollout.past_state``."""
        return self._causal.state(role, stream)

    def load_past(
        self, role: str, state: Mapping[str, object], cond: Condition, *, stream: str
    ) -> None:
        """See ``CausalRollout.load_past``."""
        tensors = tuple(cond.tensors[name] for name in sorted(cond.tensors))
        self._causal.load(role, stream, state, tensors)

    @torch.no_grad()
    def stream(
        self,
        role: str,
        spec: SamplerSpec,
        noises: Iterable[Tensor],
        cond: Condition,
        *,
        neg_cond: Condition | None = None,
        generators: RowGenerators | None = None,
        poll: Callable[[], None] | None = None,
    ) -> Generator[Tensor, None, None]:
        """Yield clean latents of a causal role's video, chunk by chunk, as ``noises`` come.

        With ``causal.window_frames`` set, neither time nor memory of a chunk depends on how many
        came before. Streams do not disturb each other, nor a method's rollout of the same role.

        Args:
            noises: of each chunk [B, C, T of the chunk, H, W] (``chunks``), without an end if need
                be.
        """
        name, handle, first = f"stream {next(self._streams)}", self._bundle[role], 0
        velocity = self._chunk_velocity(handle, spec, cond, neg_cond, poll, name)
        try:
            for clean in sampler.sample_chunks(
                velocity, spec, map(self.checked_noise, noises), generators
            ):
                yield self.insert_given_frames(handle, clean, cond, first)
                first += clean.shape[2]
        finally:
            self.clear_caches(role, stream=name)

    def decode_stream(self, latents: Iterable[Tensor]) -> Generator[Tensor, None, None]:
        """Decode a video chunk by chunk; see ``CausalRollout.decode_stream``."""
        raw = (self.denormalize_latents(chunk.detach()) for chunk in latents)
        yield from self._codec.decode_stream(raw, decode_chunks)

    def _chunk_velocity(
        self,
        handle: RoleHandle,
        spec: SamplerSpec,
        cond: Condition,
        neg_cond: Condition | None,
        poll: Callable[[], None] | None,
        stream: str,
    ) -> sampler.ChunkVelocity:
        self.check_sampler(handle, spec)

        def velocity(x: Tensor, t: Tensor, first_frame: int, store: bool) -> Tensor:
            if poll is not None:
                poll()
            chunk = ChunkCall(first_frame=first_frame, store=store, stream=stream)
            w = self.sampler_guidance(handle, spec, t)
            if store and len(set(spec.guidances)) > 1:
                # Both experts need a past of either condition, and any w but 0 and 1 calls both;
                # what the call returns is not read.
                w = 2.0
            call = VelocityCall(caches=chunk)
            return self.guided_velocity(handle, x, t, cond, neg_cond, w, call=call)

        return velocity


def _reads_embeds(role: RoleHandle) -> bool:
    return transformer_config(role).get("image_dim") is not None


def _image_kind(role: RoleHandle) -> ImageKind:
    expand = bool(role.call_options.get("expand_timesteps", False))
    return image_kind(transformer_of(role).config, expand)


def _with_grey(first: Tensor, last: Tensor | None, frames: int) -> Tensor:
    """Fill clips [B, 3, frames, H, W] up between pictures with grey, 0 in the VAE's range, as
    ``WanImageToVideoPipeline`` does."""
    ends = [] if last is None else [last]
    length = frames - first.shape[2] - len(ends)
    grey = torch.full_like(first[:, :, :1], 0.5).expand(-1, -1, length, -1, -1)
    return torch.cat([first, grey, *ends], dim=2)


_CONDITIONS: Mapping[tuple[ImageKind, bool, bool], str] = {
    ("none", False, False): "text",
    ("frame", False, False): "text, or first frames in their place",
    ("channels", False, False): "text and a first frame's latents",
    ("channels", True, False): "text, a first frame's latents and its CLIP embedding",
    ("channels", True, True): "text, latents of a first and a last frame and their CLIP embeddings",
}
"""By image kind, whether the model reads CLIP's embedding, and whether of two pictures."""


def _refuse_mixed_conditions(roles: Mapping[str, RoleHandle]) -> None:
    """Refuse roles of two kinds: one condition goes to all roles of a step."""
    conditions = {
        name: _CONDITIONS[
            _image_kind(role), _reads_embeds(role), reads_pairs(transformer_config(role))
        ]
        for name, role in roles.items()
    }
    if len(set(conditions.values())) > 1:
        each = "; ".join(f"{name} reads {tensors}" for name, tensors in conditions.items())
        raise WeightsError(
            f"the roles read different conditions ({each}), and one condition goes to all of them. "
            "Use models of one kind"
        )


def _refuse_steps_of_a_causal_role(role: str, on_step: object) -> None:
    if on_step is not None:
        raise ContractError(
            f"role {role!r} is causal and samples chunk by chunk, so there is no x_t of a "
            "whole clip to call on_step with. Sample a role that is not causal"
        )
