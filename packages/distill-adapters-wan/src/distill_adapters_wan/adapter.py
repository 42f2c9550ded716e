"""How a Wan model is called: from text or from a first frame, with one expert or two.

Letters: B batch, C channels, T latent frames, H and W latent height and width, L tokens, D width.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from distill_diffusers.calls import flow
from distill_diffusers.calls.features import Features, caught
from distill_diffusers.calls.forward_mode import derivative
from distill_diffusers.calls.precision import predicted, transformer_of
from distill_diffusers.components.encoders import TextSide, VideoCodec
from distill_diffusers.folders import fetch, read_json
from distill_diffusers.roles.discriminator import logits
from distill_diffusers.sampling import sampler as sampling
from distill_protocols import (
    Capabilities,
    CapabilityError,
    CausalRollout,
    Chunk,
    ChunkCall,
    CleanPast,
    Condition,
    ConditioningError,
    ContractError,
    Discriminating,
    ExpertRouting,
    ImageConditioning,
    ModelBundle,
    PredType,
    RoleHandle,
    RowGenerators,
    SamplerSpec,
    Tangents,
    WeightsError,
)
from torch import Tensor

from distill_adapters_wan.capabilities import capabilities_of
from distill_adapters_wan.causal.kv_cache import Place
from distill_adapters_wan.causal.roles import CausalRoles, PreparedCall, token_times
from distill_adapters_wan.config import WanPipelineConfig
from distill_adapters_wan.experts import LOW, boundary_of, expert_of, ranges
from distill_adapters_wan.images.conditions import (
    beside_channels,
    embeds_of,
    first_frame_given,
    frame_times,
    latents_of,
)
from distill_adapters_wan.images.encoder import ImageSide
from distill_adapters_wan.images.shapes import EMBEDS, LATENTS, ImageKind, image_kind
from distill_adapters_wan.shape import clip_problems, latent_facts, latent_shape


class WanAdapter:
    """``DistillAdapter``, ``ExpertRouting`` and ``ImageConditioning`` of Wan 2.1 and 2.2.

    A condition is ``{"text": [B, L, D]}`` and, of a model that reads a first frame, what
    ``distill_adapters_wan.images.conditions`` says.

    Args:
        bundle: roles, each with a module ``transformer``, and ``transformer_2`` where it has two
            experts; or, of a discriminator, ``heads``.
        config: the run's ``pipeline_config``.
        source: Diffusers folder or hub id of VAE, text encoder and tokenizer.

    Raises:
        WeightsError: ``source`` has no VAE configuration, or clip, VAE and transformer do not fit.
        RoleError: a role that ``config.causal`` names is not there.
    """

    def __init__(self, bundle: ModelBundle, config: WanPipelineConfig, *, source: str) -> None:
        self._bundle = bundle
        self._config = config
        vae_folder = fetch(source, ("vae",)) / "vae"
        facts = latent_facts(vae_folder)
        self._models = {
            name: role for name, role in bundle.roles.items() if role.discriminator is None
        }
        for name, role in self._models.items():
            for problem in clip_problems(config, facts, _facts_of(role)):
                raise WeightsError(f"role {name!r} and the VAE of {source}: {problem}")
        _refuse_mixed(self._models)
        self._latent_shape = latent_shape(config, facts)
        # Not of parameters: those of a role that waits its turn are on the CPU.
        device = next(
            (b.device for m in bundle.by_module("modules").values() for b in m.buffers()),
            torch.device("cpu"),
        )
        statistics = _latent_statistics(read_json(vae_folder / "config.json"))
        self._mean, self._std = (values.to(device) for values in statistics)
        self._codec = VideoCodec(source, device=device)
        self._text = TextSide(source, config, device=device)
        self._causal = CausalRoles(bundle, config.causal)
        self._streams = itertools.count()
        self._images = ImageSide(source, device=device)

    @property
    def capabilities(self) -> Capabilities:
        return capabilities_of(self._config)

    @property
    def causal(self) -> CausalRollout | None:
        return None if self._config.causal is None else self

    @property
    def experts(self) -> ExpertRouting:
        return self

    @property
    def images(self) -> ImageConditioning:
        return self

    @property
    def discriminators(self) -> Discriminating:
        return self

    @property
    def tangents(self) -> Tangents:
        return self

    # -- noise schedule -----------------------------------------------------------------------

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """See ``flow.add_noise``."""
        return flow.add_noise(x0, noise, t)

    def pred_to_x0(self, pred: Tensor, x_t: Tensor, t: Tensor, pred_type: PredType = "v") -> Tensor:
        """See ``flow.pred_to_x0``."""
        return flow.pred_to_x0(pred, x_t, t, pred_type)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor, pred_type: PredType = "v") -> Tensor:
        """See ``flow.target``."""
        return flow.target(x0, noise, t, pred_type)

    # -- model calls --------------------------------------------------------------------------

    def forward(
        self,
        role: str,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        *,
        fwd_pred_type: PredType = "v",
        neg_cond: Condition | None = None,
        cfg: float | None = None,
        caches: ChunkCall | CleanPast | None = None,
        features: Features | None = None,
    ) -> Tensor:
        """The prediction of ``role`` [B, C, T, H, W], fp32; guidance ``u + w (c - u)`` in fp32.

        ``cfg`` of None or 1 calls the model on ``cond`` alone, 0 on ``neg_cond`` alone; any other
        costs two calls, or one of 2B (``cfg_batched``; with a ``ChunkCall`` two, each with a past
        of its own). What ``neg_cond`` does not hold, such as a picture, is that of ``cond``.

        A role of two experts is called by ``t``: on the CPU it costs nothing, on another device
        the host waits for it. A frame that ``cond`` gives (``trained_frames``) replaces that of
        ``x_t``; as x0 it is returned as it was given, as v or eps it means nothing.

        Raises:
            ConditioningError: guidance without ``neg_cond``, or a condition of a wrong shape.
            CapabilityError: ``features`` with guidance or of a causal role, or ``caches`` of a role
                that is not causal.
            ContractError: ``features`` of a block that is not there, ``t`` lies on both sides of
                the role's boundary, or a chunk does not follow what is cached.
        """
        flow.sigma_of(t, x_t)  # refuses t that is rounded or of another shape
        handle = self._bundle[role]
        w = 1.0 if cfg is None else cfg
        if features is not None:
            self._refuse_features(role, w)
        batched = self._config.cfg_batched and not isinstance(caches, ChunkCall)
        v = self._guided(
            handle, x_t, t, cond, neg_cond, w, batched=batched, caches=caches, features=features
        )
        pred = flow.v_to_pred(v, x_t, t.to(x_t.device), fwd_pred_type).float()
        if fwd_pred_type != "x0":
            return pred
        first = caches.first_frame if isinstance(caches, ChunkCall) else 0
        return self._with_given(handle, pred, cond, first)

    def forward_jvp(
        self, role: str, x_t: Tensor, t: Tensor, cond: Condition, *, dx: Tensor, dt: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``Tangents``; attention runs without a fused kernel (``forward_mode``).

        A frame that ``cond`` gives does not move, whatever ``dx`` says.
        """
        flow.sigma_of(t, x_t)
        handle = self._bundle[role]
        return derivative(
            lambda x, time: self._velocity(handle, x, time, cond), x_t, t.to(x_t.device), dx, dt
        )

    def _guided(
        self,
        role: RoleHandle,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        neg_cond: Condition | None,
        w: float,
        *,
        batched: bool,
        caches: ChunkCall | CleanPast | None = None,
        stock: bool = False,
        features: Features | None = None,
    ) -> Tensor:
        if w == 1:
            return self._velocity(role, x_t, t, cond, caches, stock=stock, features=features)
        if neg_cond is None:
            raise ConditioningError(
                f"guidance w = {w:g} of role {role.name!r} without a negative condition; only "
                "w = 1 (or none) needs none. Give the run a negative prompt or embedding"
            )
        negative = neg_cond.expand(x_t.shape[0]).merged_onto(cond.expand(x_t.shape[0]))
        if w == 0:
            return self._velocity(role, x_t, t, negative, caches, negative=True, stock=stock)
        if batched:
            both = Condition.cat([cond.expand(x_t.shape[0]), negative])
            if isinstance(caches, CleanPast):
                caches = caches.repeated(2)
            pair = self._velocity(role, torch.cat([x_t, x_t]), torch.cat([t, t]), both, caches)
            conditional, unconditional = pair.chunk(2)
            return flow.guide(conditional, unconditional, w)
        return flow.guide(
            self._velocity(role, x_t, t, cond, caches, stock=stock),
            self._velocity(role, x_t, t, negative, caches, negative=True, stock=stock),
            w,
        )

    def _velocity(
        self,
        role: RoleHandle,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        caches: ChunkCall | CleanPast | None = None,
        *,
        negative: bool = False,
        stock: bool = False,
        features: Features | None = None,
    ) -> Tensor:
        """``stock``: as the pipelines of diffusers do where something else is equal but cheaper."""
        expert = self._expert(role, t)
        cond, t = cond.expand(x_t.shape[0]), t.to(x_t.device)
        if isinstance(caches, ChunkCall) and caches.store:
            # Each expert attends to keys of its own, so what becomes past becomes it for both.
            with torch.no_grad():
                for other in sorted(role.modules.keys() - {expert}):
                    self._called(role, other, x_t, t, cond, caches, negative=negative, stock=stock)
        catching = contextlib.nullcontext()
        if features is not None:
            catching = caught(transformer_of(role, expert), features, x_t.shape)
        with catching:
            return self._called(role, expert, x_t, t, cond, caches, negative=negative, stock=stock)

    def _refuse_features(self, role: str, w: float) -> None:
        if w != 1:
            raise CapabilityError(
                f"features of role {role!r} with guidance w = {w:g}: it makes two calls, and which "
                "one's they should be nobody says. Ask for them in a call without guidance"
            )
        if self._causal.of(role) is not None:
            raise CapabilityError(
                f"features of role {role!r}, which is causal: a discriminator reads whole clips. "
                "Ask for those of a role that is not in pipeline_config.causal.roles"
            )

    def discriminate(self, role: str, features: Mapping[int, Tensor]) -> Tensor:
        """See ``Discriminating.discriminate``."""
        return logits(self._bundle[role], features)

    def _called(
        self,
        role: RoleHandle,
        expert: str,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        caches: ChunkCall | CleanPast | None,
        *,
        negative: bool,
        stock: bool,
    ) -> Tensor:
        text = self._checked_text(role, cond)
        transformer = transformer_of(role, expert)
        stream = caches.stream if isinstance(caches, ChunkCall) else ""
        place = Place(role=role.name, module=expert, negative=negative, stream=stream)
        given = tuple(cond.tensors[name] for name in sorted(cond.tensors))
        call = self._causal.prepared(place, x_t, t, given, caches, transformer=transformer)
        hidden, times = self._model_inputs(role, call, cond, stock=stock)
        v = predicted(
            role,
            self.to_model_layout(hidden),
            times,
            text.to(x_t.device),
            embeds_of(cond, transformer.config, x_t),
            module=expert,
            arguments=call.arguments,
        )
        return call.finish(self.from_model_layout(v).float())

    def _model_inputs(
        self, role: RoleHandle, call: PreparedCall, cond: Condition, *, stock: bool
    ) -> tuple[Tensor, Tensor]:
        """What the transformer takes for latents, and its times: [B], or one a token."""
        kind, x_t, t, places = _image_kind(role), call.x_t, call.t, call.places
        image = latents_of(cond, kind, x_t, places)
        if kind == "frame" and (image is not None or stock):
            # Else not: a t that all tokens share gives the same to 4e-6 without a row of
            # modulation for each.
            t = frame_times(t, places, given=image is not None)
        times = token_times(transformer_of(role), x_t, t)
        if image is None:
            return x_t, times
        put = beside_channels if kind == "channels" else first_frame_given
        return put(x_t, image, places), times

    def _with_given(
        self, role: RoleHandle, x: Tensor, cond: Condition, first_frame: int = 0
    ) -> Tensor:
        """``x``, from ``first_frame`` on, with the frame that ``cond`` gives, if it gives one."""
        if _image_kind(role) != "frame":
            return x
        places = (range(first_frame, first_frame + x.shape[2]),)
        image = latents_of(cond.expand(len(x)), "frame", x, places)
        return x if image is None else first_frame_given(x, image, places)

    # -- experts and pictures -----------------------------------------------------------------

    def expert_of(self, role: str, t: Tensor) -> str:
        """``transformer`` where ``t`` reaches the boundary, else ``transformer_2``.

        Raises:
            ContractError: ``t`` lies on both sides of it.
        """
        return self._expert(self._bundle[role], t)

    def expert_ranges(self, *roles: str) -> tuple[tuple[float, float], ...]:
        """See ``ExpertRouting``: with ends at the boundaries of all of ``roles``."""
        found = (self._boundary(self._bundle[name]) for name in roles)
        return ranges(boundary for boundary in found if boundary is not None)

    def _expert(self, role: RoleHandle, t: Tensor) -> str:
        return expert_of(t, self._boundary(role), role.name)

    def _boundary(self, role: RoleHandle) -> float | None:
        own = role.call_options.get("boundary_ratio")
        return boundary_of(role.modules, own, self._config.boundary_ratio)

    def trained_frames(self, cond: Condition) -> Tensor | None:
        """0 on the first frame where ``cond`` gives it as a frame (TI2V-5B), else None.

        A picture in channels of its own (Wan 2.1 and A14B) leaves every frame to be predicted.
        """
        image = cond.tensors.get(LATENTS)
        if image is None or image.shape[2] != 1 or self._image_kind() != "frame":
            return None
        mask = torch.ones(1, 1, self._latent_shape[1], 1, 1, device=image.device)
        mask[:, :, 0] = 0
        return mask

    @torch.no_grad()
    def with_image(self, cond: Condition, images: Tensor) -> Condition:
        """``cond`` and what the models read of first frames [B, 3, H_px, W_px] in [0, 1].

        Raises:
            ConditioningError: the models read none, pictures are of another size than the run's
                clips, or there is not one for each row of ``cond``.
            WeightsError: Wan 2.1 reads CLIP's embedding, and the source has no image encoder.
        """
        kind, size = self._image_kind(), (self._config.height, self._config.width)
        if kind == "none":
            raise ConditioningError(
                "there is a first frame, but the models of this run read text alone; it would have "
                "no effect. Leave it out, or use an image-to-video model"
            )
        if tuple(images.shape) != (len(cond), 3, *size):
            raise ConditioningError(
                f"first frames are {list(images.shape)}, they must be [{len(cond)}, 3, {size[0]}, "
                f"{size[1]}]: one a row of the condition, of the size of the run's clips. Scale "
                "and crop them before"
            )
        first = images.to(self._mean.device).float().unsqueeze(2)
        if kind == "channels":
            # Grey, 0 in the VAE's range, as WanImageToVideoPipeline fills up the clip.
            rest = torch.full_like(first, 0.5).expand(-1, -1, self._config.num_frames - 1, -1, -1)
            first = torch.cat([first, rest], dim=2)
        # One at a time, and normalised as that pipeline does: both round otherwise together or in
        # normalize_latents.
        raw = torch.cat([self._codec.encode(clip) for clip in first.split(1)])
        tensors = {LATENTS: (raw - self._mean.to(raw)) * (1.0 / self._std.to(raw))}
        if self._reads_embeds():
            tensors[EMBEDS] = self._images.encode(images)
        return Condition(tensors).merged_onto(cond)

    def _image_kind(self) -> ImageKind:
        """Of the run's models, which are of one kind."""
        kinds: list[ImageKind] = [_image_kind(role) for role in self._models.values()]
        return kinds[0] if kinds else "none"

    def _reads_embeds(self) -> bool:
        return any(_facts_of(r).get("image_dim") is not None for r in self._models.values())

    def _checked_text(self, role: RoleHandle, cond: Condition) -> Tensor:
        if "text" not in cond.tensors:
            raise ConditioningError(
                f"the condition holds {sorted(cond.tensors)} but the Wan models read 'text' "
                "[B, L, D]; rebuild the data set with this family's encoder"
            )
        text = cond.tensors["text"]
        width = transformer_of(role).config["text_dim"]
        expected = (self._config.max_sequence_length, width)
        if tuple(text.shape[1:]) != expected:
            raise ConditioningError(
                f"text embeddings are {list(text.shape)}, they must be [B, {expected[0]}, "
                f"{expected[1]}] (max_sequence_length, the model's text_dim): Wan attends its "
                "padding, so another length gives other clips. Set "
                "pipeline_config.max_sequence_length to the data set's, or encode the data again"
            )
        return text

    # -- latents and pixels -------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of one clip of this run."""
        return self._latent_shape

    def to_model_layout(self, latents: Tensor) -> Tensor:
        """[B, C, T, H, W] is Wan's own layout."""
        return latents

    def from_model_layout(self, latents: Tensor) -> Tensor:
        """[B, C, T, H, W] is Wan's own layout."""
        return latents

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """(z - mean) / std per channel, with the VAE's own statistics."""
        wide = latents if latents.dtype == torch.float64 else latents.float()
        return (wide - self._mean.to(wide)) / self._std.to(wide)

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """z std + mean per channel, as ``WanPipeline`` computes it: bit for bit the same clips."""
        wide = latents if latents.dtype == torch.float64 else latents.float()
        return wide / (1.0 / self._std.to(wide)) + self._mean.to(wide)

    def decode(self, latents: Tensor) -> Tensor:
        """Clips [B, 3, F, H_px, W_px] in [0, 1] from normalised latents, without gradient."""
        return self._codec.decode(self.denormalize_latents(latents.detach()))

    def encode(self, video: Tensor) -> Tensor:
        """Raw (not normalised) latents of clips [B, 3, F, H_px, W_px] in [0, 1]: posterior mode."""
        return self._codec.encode(video)

    # -- text ---------------------------------------------------------------------------------

    def encode_condition(self, raw_cond: Sequence[str], images: Tensor | None = None) -> Condition:
        """``{"text": [B, L, D]}`` fp32, padded to L = max_sequence_length with zeros.

        Args:
            images: first frames, see ``with_image``.
        """
        cond = Condition({"text": self._text.encode(raw_cond)})
        return cond if images is None else self.with_image(cond, images)

    def encode_neg_condition(self, raw_neg_cond: str) -> Condition:
        """One row."""
        return self.encode_condition([raw_neg_cond])

    def condition_fingerprint(self) -> str | None:
        """Hash of text encoder, tokenizer, padding and precision; None if not on this machine."""
        return self._text.fingerprint()

    def keep_encoders_loaded(self) -> AbstractContextManager[Any]:
        """Within: the text encoder stays loaded, for many encodings after each other.

        Outside, each encoding reads it and frees it again: no run must hold UMT5-XXL's 11 to
        23 GB beside its models because it encoded one prompt.
        """
        return self._text.kept()

    def free_components(self) -> None:
        """Drop the VAE from memory; the next use reads it again."""
        self._codec.free()

    # -- causal roles -------------------------------------------------------------------------

    def chunks(self, role: str, frames: int | None = None) -> tuple[Chunk, ...]:
        """How ``role`` divides a video; see ``CausalRollout.chunks``."""
        return self._causal.chunks(role, self._latent_shape[1] if frames is None else frames)

    def clear_caches(self, role: str, *, stream: str | None = None) -> None:
        """Forget the past of ``role``: of one stream, or of all."""
        self._causal.clear(role, stream)

    def cached_bytes(self, role: str) -> int:
        """Bytes of keys and values that ``role`` has cached."""
        return self._causal.cached_bytes(role)

    # -- sampling -----------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        role: str,
        spec: SamplerSpec,
        noise: Tensor,
        cond: Condition,
        *,
        neg_cond: Condition | None = None,
        generators: RowGenerators | None = None,
        poll: Callable[[], None] | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Normalised clean latents [B, C, T, H, W]; see ``sampling.sample``.

        A causal role makes them chunk by chunk (``stream``). ``poll`` is called before each step;
        what it raises ends the sampling.

        Raises:
            ContractError: noise of another shape than the run's clips, not one generator a row
                for a stochastic spec, ``guidance_2`` for a role of one expert, or ``on_step`` for a
                causal role.
        """
        if tuple(noise.shape[1:]) != self._latent_shape:
            raise ContractError(
                f"noise is {list(noise.shape)}, it must be [B, "
                f"{', '.join(map(str, self._latent_shape))}] for this run's clips"
            )
        if self._causal.of(role) is not None:
            if on_step is not None:
                raise ContractError(
                    f"role {role!r} is causal and samples chunk by chunk, so there is no x_t of a "
                    "whole clip to be on_step. Take it out of pipeline_config.causal.roles"
                )
            parts = (noise[:, :, chunk.span] for chunk in self.chunks(role, noise.shape[2]))
            made = self.stream(
                role, spec, parts, cond, neg_cond=neg_cond, generators=generators, poll=poll
            )
            return torch.cat(list(made), dim=2)
        handle = self._bundle[role]
        velocity = self._sampled_velocity(handle, spec, cond, neg_cond, poll)
        clean = sampling.sample(velocity, spec, noise, generators, on_step=on_step)
        return self._with_given(handle, clean, cond)

    def rollout(
        self,
        role: str,
        spec: SamplerSpec,
        noise: Tensor,
        cond: Condition,
        *,
        exit_steps: Sequence[int],
        requires_grad: Sequence[bool] | None = None,
        generators: RowGenerators | None = None,
        poll: Callable[[], None] | None = None,
    ) -> Tensor:
        """See ``Sampler.rollout``; the past of a causal role is that of stream "rollout".

        Raises:
            ContractError: as ``sample``; a guided spec, as nobody trains two calls; or not one
                exit and one ``requires_grad`` a chunk.
        """
        if spec.guided:
            raise ContractError(
                f"a rollout with guidance {spec.guidances}: it would learn through one call of "
                "two. A method refuses it before; use guidance 1"
            )
        chunks = self.chunks(role, noise.shape[2])
        requires_grad = [True] * len(chunks) if requires_grad is None else requires_grad
        if not len(exit_steps) == len(requires_grad) == len(chunks):
            raise ContractError(
                f"{len(exit_steps)} exit_steps and {len(requires_grad)} requires_grad for "
                f"{len(chunks)} chunks of role {role!r}; there must be one of each a chunk"
            )
        may = torch.is_grad_enabled()
        requires_grad = [learn and may for learn in requires_grad]
        handle, noise = self._bundle[role], self._checked_noise(noise)
        if self._causal.of(role) is None:
            velocity = self._sampled_velocity(handle, spec, cond, None, poll)
            clean = sampling.sample(
                velocity,
                spec,
                noise,
                generators,
                exit_step=exit_steps[0],
                requires_grad=requires_grad[0],
            )
            return self._with_given(handle, clean, cond)
        parts = (noise[:, :, chunk.span] for chunk in chunks)
        in_chunks = self._chunk_velocity(handle, spec, cond, None, poll, ChunkCall.ROLLOUT)
        self.clear_caches(role, stream=ChunkCall.ROLLOUT)
        try:
            made = sampling.sample_chunks(
                in_chunks,
                spec,
                parts,
                generators,
                exit_steps=exit_steps,
                requires_grad=requires_grad,
            )
            return self._with_given(handle, torch.cat(list(made), dim=2), cond)
        finally:
            self.clear_caches(role, stream=ChunkCall.ROLLOUT)

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
        """Clean latents of a causal role's video, chunk by chunk, as ``noises`` are asked for.

        With ``causal.window_frames`` set, neither time nor memory of a chunk depends on how many
        came before. Streams do not disturb each other, nor a method's rollout of the same role.

        Args:
            noises: of each chunk [B, C, T of the chunk, H, W] (``chunks``), without an end if need
                be.
        """
        name, handle, first = f"stream {next(self._streams)}", self._bundle[role], 0
        velocity = self._chunk_velocity(handle, spec, cond, neg_cond, poll, name)
        try:
            for clean in sampling.sample_chunks(
                velocity, spec, map(self._checked_noise, noises), generators
            ):
                yield self._with_given(handle, clean, cond, first)
                first += clean.shape[2]
        finally:
            self.clear_caches(role, stream=name)

    def _checked_noise(self, noise: Tensor) -> Tensor:
        channels, _, height, width = self._latent_shape
        if noise.dim() != 5 or (noise.shape[1], *noise.shape[3:]) != (channels, height, width):
            raise ContractError(
                f"noise is {list(noise.shape)}, it must be [B, {channels}, T, {height}, "
                f"{width}] for this run's clips"
            )
        return noise

    def _sampled_velocity(
        self,
        handle: RoleHandle,
        spec: SamplerSpec,
        cond: Condition,
        neg_cond: Condition | None,
        poll: Callable[[], None] | None,
    ) -> sampling.Velocity:
        _check_guidances(handle, spec)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            if poll is not None:
                poll()
            # Two calls for guidance, whatever cfg_batched says, as WanPipeline makes them: a call
            # of 2B rounds otherwise, and an export must give the same clip bit for bit.
            w = spec.guidances[self._expert(handle, t) == LOW]
            return self._guided(handle, x, t, cond, neg_cond, w, batched=False, stock=True)

        return velocity

    def _chunk_velocity(
        self,
        handle: RoleHandle,
        spec: SamplerSpec,
        cond: Condition,
        neg_cond: Condition | None,
        poll: Callable[[], None] | None,
        stream: str,
    ) -> sampling.ChunkVelocity:
        _check_guidances(handle, spec)

        def velocity(x: Tensor, t: Tensor, first_frame: int, store: bool) -> Tensor:
            if poll is not None:
                poll()
            call = ChunkCall(first_frame=first_frame, store=store, stream=stream)
            w = spec.guidances[self._expert(handle, t) == LOW]
            if store and len(set(spec.guidances)) > 1:
                w = 2.0  # any that takes both: nobody reads it, and each expert needs its own pasts
            return self._guided(handle, x, t, cond, neg_cond, w, batched=False, caches=call)

        return velocity


def _facts_of(role: RoleHandle) -> dict[str, Any]:
    """Numbers of its transformer; two experts are of one architecture."""
    return dict(transformer_of(role).config)


def _check_guidances(role: RoleHandle, spec: SamplerSpec) -> None:
    if spec.guidance_2 is not None and LOW not in role.modules:
        raise ContractError(
            f"the sampler has guidance_2 {spec.guidance_2:g}, and role {role.name!r} has one "
            "expert that it would never reach. Leave it out"
        )


def _refuse_mixed(roles: Mapping[str, RoleHandle]) -> None:
    """One condition goes to all roles of a step, so they must read the same of it."""
    reads = {
        name: (_image_kind(role), _facts_of(role).get("image_dim") is not None)
        for name, role in roles.items()
    }
    if len(set(reads.values())) > 1:
        said = {
            ("none", False): "text",
            ("frame", False): "text, or a first frame in its place",
            ("channels", False): "text and a first frame's latents",
            ("channels", True): "text, a first frame's latents and its CLIP embedding",
        }
        told = "; ".join(f"{name} reads {said[kind]}" for name, kind in reads.items())
        raise WeightsError(
            f"the roles read different conditions ({told}), and one condition goes to all of them. "
            "Use models of one kind"
        )


def _image_kind(role: RoleHandle) -> ImageKind:
    expand = bool(role.call_options.get("expand_timesteps", False))
    return image_kind(transformer_of(role).config, expand)


def _latent_statistics(vae_config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean and std [1, C, 1, 1, 1] of raw latents."""
    try:
        mean, std = vae_config["latents_mean"], vae_config["latents_std"]
    except KeyError as error:
        raise WeightsError(
            f"vae/config.json has no {error}; without it latents cannot be normalised. Use the "
            "folder of a Wan VAE"
        ) from error
    shape = (1, -1, 1, 1, 1)
    return torch.tensor(mean).view(shape), torch.tensor(std).view(shape)
