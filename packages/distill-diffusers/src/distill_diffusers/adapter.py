"""The adapter that every flow-matching model on diffusers inherits from.

A family writes one class on ``FlowMatchingAdapter``. It must say

- how its transformer is called: ``predict_velocity``;
- how its prompts become conditions: ``encode_condition``;
- in its constructor: the model kind, the shape of a clip's latents and their statistics, the VAE
  and the encoders.

Everything else (noise, guidance, hidden states, derivatives, sampling, rollouts, latents) is here,
and each step that some model does otherwise is a method of its own to override:
``combine_guidance`` (norm-rescaled, CFG-zero), ``guide_calls`` (guidance by more than two calls),
``guided_velocity`` (guidance as an input),
``choose_module`` (experts), ``feature_layout`` (where hidden states are), ``insert_given_frames``
(a first frame that is not predicted), ``start_latents`` (samplers that do not begin at pure noise),
``denormalize_latents``. Models of another noise schedule or prediction are called through
``distill_diffusers.variance_preserving``.

Letters: B batch, C channels, T latent frames, H and W latent height and width, L tokens, D width.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from attrs import evolve, frozen
from distill_protocols import (
    EXIT_EMBEDDING,
    Capabilities,
    CapabilityError,
    CausalRollout,
    ChunkCall,
    CleanPast,
    Condition,
    ConditioningError,
    ContractError,
    Discriminating,
    ExitConditioning,
    ExpertRouting,
    Fingerprint,
    FlowMaps,
    ImageConditioning,
    JointLatents,
    LatentParts,
    Latents,
    LatentsT,
    ModelBundle,
    PartShapes,
    PredType,
    RoleHandle,
    RowGenerators,
    SamplerSpec,
    Tangents,
    WeightsError,
    flatten_parts,
    main_part,
    map_latents,
    restore_parts,
)
from torch import Tensor

from distill_diffusers.calls import flow
from distill_diffusers.calls.features import FeatureLayout, Features, collect_features
from distill_diffusers.calls.forward_mode import derivative
from distill_diffusers.components.codec import VideoCodec
from distill_diffusers.components.encoders import TextEncoders
from distill_diffusers.components.statistics import LatentStatistics
from distill_diffusers.fingerprints import latent_fingerprint
from distill_diffusers.kinds import TRAIN_STEPS, ModelKind
from distill_diffusers.roles.discriminator import logits
from distill_diffusers.roles.exits import ExitEmbedding, add_to_time_embedding
from distill_diffusers.roles.target_time import mix_target_time, target_gate
from distill_diffusers.sampling import sampler


@frozen(kw_only=True, eq=False)
class VelocityCall:
    """What a family may need to know of a call beside its tensors.

    Attributes:
        caches: see ``Denoiser.forward``; only of a family with causal roles.
        exits: exit steps [B, 1] or [B, T] that the role is told; ``velocity`` adds their embedding.
        is_negative: the condition is the negative one of guidance.
        like_pipeline: the call is one of the sampler, whose clips an exported model must repeat
            bit for bit: where two computations are equal but for rounding, the pipeline's is due.
        guidance: w, of a family whose transformers read it as an input; it overrides
            ``guided_velocity``.
        next_t: the time that the call leads to: of the sampler's next call [], 0 after the last;
            or [B] (``forward_to``). None: none is meant. Read by models of average velocities
            between two times (MeanFlow, Geng et al. 2025).
        parts: shapes of latents of several parts, which calls have as rows [B, 1, 1, 1, N]
            (``cut_parts``); None: x_t is one tensor.
        kept: what a family computed in earlier calls of the same sampler without gradient, by names
            of its own; None where the call is none of a sampler.
    """

    caches: ChunkCall | CleanPast | None = None
    exits: Tensor | None = None
    is_negative: bool = False
    like_pipeline: bool = False
    guidance: float | None = None
    next_t: Tensor | None = None
    parts: PartShapes | None = None
    kept: MutableMapping[str, object] | None = None


class FlowMatchingAdapter(abc.ABC):
    """``DistillAdapter`` of a flow-matching model on diffusers; see the module's text.

    Args:
        bundle: the run's roles. Each model has the modules that ``kind`` names; a discriminator
            has heads.
        kind: the transformer's class and where its parts are.
        capabilities: what this run's adapter supports.
        latent_shape: (C, T, H, W) of one clip; T = 1 for an image model.
        other_shapes: that clips may have beside it.
        statistics: of raw latents.
        codec: the VAE.
        encoders: what turns prompts into conditions; None: all conditions are stored.
        batch_guidance: guidance in one call of 2B instead of two of B: faster, more memory. In
            training alone; sampling does as the family's pipeline (``pipeline_batches_guidance``).

    Raises:
        WeightsError: there is not one mean and one deviation for each channel of the latents.
    """

    pipeline_batches_guidance: ClassVar[bool] = False
    """Whether the family's pipeline guides in one call of 2B, so that a sampler does it too: a call
    of 2B rounds otherwise than two of B, and an export must give the same clip bit for bit."""

    def __init__(
        self,
        bundle: ModelBundle,
        *,
        kind: ModelKind,
        capabilities: Capabilities,
        latent_shape: tuple[int, int, int, int],
        other_shapes: Iterable[tuple[int, int, int, int]] = (),
        statistics: LatentStatistics,
        codec: VideoCodec,
        encoders: TextEncoders | None,
        batch_guidance: bool = True,
    ) -> None:
        channels = statistics.mean.shape[1], statistics.std.shape[1]
        if set(channels) != {latent_shape[0]}:
            raise WeightsError(
                f"the VAE has {latent_shape[0]} channels, and statistics of {channels[0]} (mean) "
                f"and {channels[1]} (deviation); there must be one of each a channel. Mend the "
                "VAE's configuration, or use another copy of it"
            )
        self._bundle = bundle
        self._kind = kind
        self._capabilities = capabilities
        self._latent_shape = latent_shape
        self._shapes = tuple(dict.fromkeys([latent_shape, *other_shapes]))
        self._statistics = statistics.to(device_of(bundle))
        self._codec = codec
        self._encoders = encoders
        self._batch_guidance = batch_guidance

    # -- what a family defines ------------------------------------------------------------------

    @abc.abstractmethod
    def predict_velocity(
        self,
        role: RoleHandle,
        module: str,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        call: VelocityCall,
    ) -> Tensor:
        """Call ``module`` of ``role`` and return v [B, C, T, H, W] in fp32, without guidance.

        A family checks the condition's tensors, brings latents to its transformer's layout, calls
        it within ``call_in_precision``, and brings the output back.

        Args:
            x_t: [B, C, T, H, W].
            t: [B] (or [B, T] where the family supports it) in [0, 1000], on the device of ``x_t``.
            cond: of B rows; on any device.

        Raises:
            ConditioningError: a tensor of ``cond`` is missing or of another shape than the model
                reads. The message states which shape it should have, and why.
        """

    @abc.abstractmethod
    def encode_condition(self, raw_cond: Sequence[str]) -> Condition:
        """Encode prompts as the family's pipeline does, fp32, one row a prompt."""

    def encode_neg_condition(self, raw_neg_cond: str) -> Condition:
        """Encode one negative prompt: one row."""
        return self.encode_condition([raw_neg_cond])

    def choose_module(self, role: RoleHandle, t: Tensor) -> str:
        """Choose which module of ``role`` a call at ``t`` goes to; by default the kind's first."""
        return self._kind.modules[0]

    def feature_layout(self, role: RoleHandle, module: str, x_t: Tensor) -> FeatureLayout:
        """Say where hidden states are; needed of a family with ``supports_features``."""
        raise NotImplementedError(
            f"{type(self).__name__} declares supports_features, so it must override feature_layout"
        )

    def combine_guidance(
        self, cond: Tensor, uncond: Tensor, w: float, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """Combine two velocities by guidance w; by default ``u + w (c - u)``, in fp32."""
        return flow.guide(cond, uncond, w)

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
        """Guide by the two calls that were made; by default ``combine_guidance`` of them.

        A family whose guidance needs further calls (LTX-2) makes them here.
        """
        return self.combine_guidance(conditional, unconditional, w, x_t, t)

    def start_latents(self, noise: Tensor, sigma: float) -> Tensor:
        """Make x at ``sigma``, the first level of a sampler, of standard normal noise; by default
        it is the noise, which is exact at sigma = 1."""
        return noise

    def insert_given_frames(
        self, role: RoleHandle, x: Tensor, cond: Condition, first_frame: int = 0
    ) -> Tensor:
        """Replace frames of clean latents that ``cond`` gives; by default there are none.

        Args:
            x: frames ``first_frame ..`` of a clip [B, C, T, H, W].
        """
        return x

    # -- optional contracts -------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """What this run's adapter supports."""
        return self._capabilities

    @property
    def causal(self) -> CausalRollout | None:
        """None: a family with causal roles overrides it."""
        return None

    @property
    def experts(self) -> ExpertRouting | None:
        """None: a family with several modules a role overrides it."""
        return None

    @property
    def images(self) -> ImageConditioning | None:
        """None: a family whose models read pictures overrides it."""
        return None

    @property
    def discriminators(self) -> Discriminating | None:
        """This adapter, where hidden states can be read."""
        return self if self._capabilities.supports_features else None

    @property
    def tangents(self) -> Tangents | None:
        """This adapter, where calls can be differentiated in forward mode."""
        return self if self._capabilities.supports_jvp else None

    @property
    def exits(self) -> ExitConditioning | None:
        """This adapter, where the kind states where its time embedding is."""
        return self if self._capabilities.supports_exits else None

    @property
    def flow_maps(self) -> FlowMaps | None:
        """This adapter, where the kind states where a second time embedder is."""
        return self if self._capabilities.supports_flow_maps else None

    @property
    def parts(self) -> JointLatents | None:
        """None: a family whose clips are several named tensors overrides it."""
        return None

    # -- noise schedule -----------------------------------------------------------------------

    def add_noise(self, x0: LatentsT, noise: LatentsT, t: Tensor) -> LatentsT:
        """See ``flow.add_noise``."""
        return map_latents(lambda x0, noise: flow.add_noise(x0, noise, t), x0, noise)

    def pred_to_x0(
        self, pred: LatentsT, x_t: LatentsT, t: Tensor, pred_type: PredType = "v"
    ) -> LatentsT:
        """See ``flow.pred_to_x0``."""
        return map_latents(lambda p, x_t: flow.pred_to_x0(p, x_t, t, pred_type), pred, x_t)

    def target(
        self, x0: LatentsT, noise: LatentsT, t: Tensor, pred_type: PredType = "v"
    ) -> LatentsT:
        """See ``flow.target``."""
        return map_latents(lambda x0, noise: flow.target(x0, noise, t, pred_type), x0, noise)

    # -- model calls --------------------------------------------------------------------------

    def forward(
        self,
        role: str,
        x_t: LatentsT,
        t: Tensor,
        cond: Condition,
        *,
        fwd_pred_type: PredType = "v",
        neg_cond: Condition | None = None,
        cfg: float | None = None,
        caches: ChunkCall | CleanPast | None = None,
        features: Features | None = None,
    ) -> LatentsT:
        """Predict ``fwd_pred_type`` with ``role``: [B, C, T, H, W], fp32.

        ``cfg`` of None or 1 calls the model on ``cond`` alone, 0 on ``neg_cond`` alone. Any other
        takes two calls, or one of 2B (``batch_guidance``; never with a ``ChunkCall``, whose two
        conditions have a past each). A tensor that ``neg_cond`` does not have, such as a picture,
        is that of ``cond``.

        Which of several modules is called depends on ``t``: that costs nothing on the CPU, and on
        another device the host waits for it. A frame that ``cond`` gives is returned as it was
        given in x0; in v and eps it means nothing.

        Raises:
            ConditioningError: guidance without ``neg_cond``, or a condition of a wrong shape.
            CapabilityError: ``features``, ``caches`` or a ``t`` for each frame that the family or
                the role does not support; ``features`` with guidance.
            ContractError: ``features`` of a block that is not there, ``t`` of several modules, or
                a chunk that does not follow what is cached.
        """
        x, shapes = self.flatten(x_t)
        flow.sigma_of(t, x)  # refuses t that is rounded or of another shape
        handle = self._bundle[role]
        w = 1.0 if cfg is None else cfg
        self._check_call(handle, t, caches)
        if features is not None:
            self.check_features(handle, w)
        v = self.guided_velocity(
            handle,
            x,
            t,
            cond,
            neg_cond,
            w,
            call=VelocityCall(caches=caches, parts=shapes),
            batched=self._batch_guidance and not isinstance(caches, ChunkCall),
            features=features,
        )
        first_frame = caches.first_frame if isinstance(caches, ChunkCall) else 0
        prediction = self._prediction(handle, v, x, t, cond, fwd_pred_type, first_frame)
        return restore_parts(prediction, x_t)

    def flatten(self, latents: Latents) -> tuple[Tensor, PartShapes | None]:
        """Return latents as the calls of this class take them, and the shapes of their parts: all
        that it computes is elementwise, so several parts are one row.

        Raises:
            ContractError: several parts, of a family or a run that has one tensor; or one.
        """
        if isinstance(latents, LatentParts) != (self.parts is not None):
            found = f"parts {list(latents.shapes)}" if isinstance(latents, LatentParts) else "one"
            raise ContractError(
                f"latents of {found}, and clips of this run are "
                f"{'several named tensors' if self.parts is not None else 'one tensor'}. Give "
                "those that normalize_latents and the sampler of this adapter return"
            )
        shapes = latents.shapes if isinstance(latents, LatentParts) else None
        return flatten_parts(latents), shapes

    def exit_count(self, role: str) -> int:
        """See ``ExitConditioning.exit_count``."""
        embedding = self._bundle[role].modules.get(EXIT_EMBEDDING)
        return embedding.count if isinstance(embedding, ExitEmbedding) else 0

    def forward_at_exits(
        self,
        role: str,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        *,
        exits: Tensor,
        fwd_pred_type: PredType = "v",
    ) -> Tensor:
        """See ``ExitConditioning.forward_at_exits``."""
        flow.sigma_of(t, x_t)
        handle, (rows, _, frames) = self._bundle[role], x_t.shape[:3]
        if not self.exit_count(role):
            raise ContractError(
                f"role {role!r} is called with exit steps and was loaded without an embedding of "
                "them. Load it with RoleSpec.exits, or call forward"
            )
        if exits.dim() != 2 or exits.shape[0] not in (1, rows) or exits.shape[1] not in (1, frames):
            raise ContractError(
                f"exits are {list(exits.shape)} of {rows} clips of {frames} frames; they must be "
                "[1 or B, 1], or one a frame [1 or B, T]"
            )
        if exits.shape[1] > 1:
            # Each frame's tokens get a time of their own, for an embedding to be added to.
            t = t[:, None].expand(rows, frames).contiguous()
        self._check_call(handle, t, None)
        exits = exits.to(x_t.device).expand(rows, -1)
        call = VelocityCall(exits=exits)
        v = self.guided_velocity(handle, x_t, t, cond, None, 1.0, call=call)
        return self._prediction(handle, v, x_t, t, cond, fwd_pred_type)

    def forward_to(
        self, role: str, x_t: Tensor, t: Tensor, target_t: Tensor, cond: Condition
    ) -> Tensor:
        """See ``FlowMaps.forward_to``."""
        flow.sigma_of(t, x_t)
        handle = self._bundle[role]
        if target_gate(handle) is None:
            raise ContractError(
                f"role {role!r} is called from t to another time and was loaded without a second "
                "time embedder. Load it with RoleSpec.target_time, or call forward"
            )
        if target_t.shape != t.shape or t.dim() != 1:
            raise ContractError(
                f"t is {list(t.shape)} and target_t {list(target_t.shape)}; both must be "
                f"[{len(x_t)}], one a clip"
            )
        return self.velocity(handle, x_t, t, cond, VelocityCall(next_t=target_t))

    def _prediction(
        self,
        role: RoleHandle,
        v: Tensor,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        pred_type: PredType,
        first_frame: int = 0,
    ) -> Tensor:
        """Turn v of a call into ``pred_type``, fp32, with the frames that ``cond`` gives."""
        pred = flow.v_to_pred(v, x_t, t.to(x_t.device), pred_type).float()
        if pred_type != "x0":
            return pred
        return self.insert_given_frames(role, pred, cond, first_frame)

    def forward_jvp(
        self, role: str, x_t: Tensor, t: Tensor, cond: Condition, *, dx: Tensor, dt: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``Tangents``; attention runs without a fused kernel (``forward_mode``).

        A frame that ``cond`` gives does not move, whatever ``dx`` states.
        """
        flow.sigma_of(t, x_t)
        handle = self._bundle[role]
        self._check_call(handle, t, None)
        return derivative(
            lambda x, time: self.velocity(handle, x, time, cond, VelocityCall()),
            x_t,
            t.to(x_t.device),
            dx,
            dt,
        )

    def discriminate(self, role: str, features: Mapping[int, Tensor]) -> Tensor:
        """See ``Discriminating.discriminate``."""
        return logits(self._bundle[role], features)

    def guided_velocity(
        self,
        role: RoleHandle,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        neg_cond: Condition | None,
        w: float,
        *,
        call: VelocityCall,
        batched: bool = False,
        features: Features | None = None,
    ) -> Tensor:
        """Return v with guidance w, from one call or two.

        A family whose transformer takes w as an input overrides it.

        Args:
            batched: make one call of 2B of the two.
        """
        if w == 1:
            return self.velocity(role, x_t, t, cond, call, features=features)
        if neg_cond is None:
            raise ConditioningError(
                f"guidance w = {w:g} of role {role.name!r} without a negative condition; only "
                "w = 1 (or none) needs none. Give the run a negative prompt or embedding"
            )
        rows = x_t.shape[0]
        negative = neg_cond.expand(rows).merged_onto(cond.expand(rows))
        negative_call = evolve(call, is_negative=True)
        if w == 0:
            return self.velocity(role, x_t, t, negative, negative_call)
        if batched:
            both = Condition.cat([cond.expand(rows), negative])
            if isinstance(call.caches, CleanPast):
                call = evolve(call, caches=call.caches.repeated(2))
            pair = self.velocity(role, torch.cat([x_t, x_t]), torch.cat([t, t]), both, call)
            conditional, unconditional = pair.chunk(2)
        else:
            conditional = self.velocity(role, x_t, t, cond, call)
            unconditional = self.velocity(role, x_t, t, negative, negative_call)
        return self.guide_calls(role, conditional, unconditional, w, x_t, t, cond, call)

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
        """Return v of one model call in fp32, and fill ``features`` if there are any."""
        module = self.choose_module(role, t)
        cond, t = cond.expand(x_t.shape[0]), t.to(x_t.device)
        with contextlib.ExitStack() as around:
            if features is not None:
                layout = self.feature_layout(role, module, x_t)
                around.enter_context(collect_features(role.modules[module], features, layout))
            if (gate := target_gate(role)) is not None:
                target_t = t if call.next_t is None else call.next_t.to(t).expand(x_t.shape[0])
                around.enter_context(
                    mix_target_time(self._kind, role.modules[module], target_t, gate)
                )
            if call.exits is not None:
                embedding = role.modules[EXIT_EMBEDDING](call.exits)
                place = self._kind.time_embedder
                around.enter_context(add_to_time_embedding(role.modules[module], place, embedding))
            return self.predict_velocity(role, module, x_t, t, cond, call)

    def check_features(self, role: RoleHandle, w: float) -> None:
        """Refuse to collect hidden states where they are not those of one call on a whole clip.

        Raises:
            CapabilityError: guidance, or a family without ``supports_features``.
        """
        self._capabilities.require(["supports_features"], by=f"features of role {role.name!r}")
        if w != 1:
            raise CapabilityError(
                f"features of role {role.name!r} with guidance w = {w:g}: it makes two calls, and "
                "which of the two is meant is not known. Ask for them in a call without guidance"
            )

    def _check_call(
        self, role: RoleHandle, t: Tensor, caches: ChunkCall | CleanPast | None
    ) -> None:
        if t.dim() == 2:
            self._capabilities.require(["supports_frame_times"], by="t of shape [B, T]")
        if caches is not None and self.causal is None:
            raise CapabilityError(
                f"forward of role {role.name!r} was given caches ({type(caches).__name__}), but "
                "this role sees whole clips. Make the role causal, or call it without caches"
            )

    # -- sampling -----------------------------------------------------------------------------

    @torch.no_grad()
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
        """Sample normalised clean latents [B, C, T, H, W]; see ``sampler.sample``.

        Raises:
            ContractError: noise of another shape than the run's clips, not one generator a row
                for a stochastic spec, or ``guidance_2`` for a role of one module.
        """
        self.check_clip_noise(main_part(noise))
        handle, (x, shapes) = self._bundle[role], self.flatten(noise)
        velocity = self._sampler_velocity(handle, spec, cond, neg_cond, poll, shapes)
        clean = sampler.sample(
            velocity,
            spec,
            self.start_latents(x, spec.sigmas()[0]),
            generators,
            on_step=on_step and (lambda step, x: on_step(step, restore_parts(x, noise))),
        )
        return restore_parts(self.insert_given_frames(handle, clean, cond), noise)

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
        """See ``Sampler.rollout``.

        Raises:
            ContractError: as ``sample``; a guided spec; or not one exit step and one
                ``requires_grad``, as the whole clip is one chunk.
        """
        gradients = checked_rollout(role, spec, exit_steps, requires_grad, chunks=1)
        self.checked_noise(main_part(noise))
        handle, (x, shapes) = self._bundle[role], self.flatten(noise)
        velocity = self._sampler_velocity(handle, spec, cond, None, poll, shapes)
        clean = sampler.sample(
            velocity,
            spec,
            self.start_latents(x, spec.sigmas()[0]),
            generators,
            exit_step=exit_steps[0],
            requires_grad=gradients[0],
            on_step=on_step and (lambda step, x: on_step(step, restore_parts(x, noise))),
        )
        return restore_parts(self.insert_given_frames(handle, clean, cond), noise)

    def check_clip_noise(self, noise: Tensor) -> None:
        """Refuse noise that is not of the run's clips.

        Raises:
            ContractError: another shape.
        """
        if tuple(noise.shape[1:]) not in self._shapes:
            known = " or ".join(f"[B, {', '.join(map(str, shape))}]" for shape in self._shapes)
            raise ContractError(
                f"noise is {list(noise.shape)}, it must be {known} for this run's clips"
            )

    def checked_noise(self, noise: Tensor) -> Tensor:
        """Return ``noise`` if it is of the run's clips, but for its number of frames.

        Raises:
            ContractError: other channels, or another height or width.
        """
        sizes = dict.fromkeys((c, height, width) for c, _, height, width in self._shapes)
        if noise.dim() != 5 or (noise.shape[1], *noise.shape[3:]) not in sizes:
            known = " or ".join(f"[B, {c}, T, {height}, {width}]" for c, height, width in sizes)
            raise ContractError(
                f"noise is {list(noise.shape)}, it must be {known} for this run's clips"
            )
        return noise

    def sampler_guidance(self, role: RoleHandle, spec: SamplerSpec, t: Tensor) -> float:
        """Choose w of a sampler's call at ``t``: ``guidance_2`` from the second module on."""
        return spec.guidances[self.choose_module(role, t) != self._kind.modules[0]]

    def check_sampler(self, role: RoleHandle, spec: SamplerSpec) -> None:
        """Refuse a spec that has no meaning for ``role``.

        Raises:
            ContractError: ``guidance_2`` for a role whose only module is the kind's first, or a
                solver or noise for a flow map.
            CapabilityError: a solver that ``capabilities`` does not state.
        """
        if spec.solver not in self._capabilities.solvers:
            raise CapabilityError(
                f"the sampler has solver {spec.solver}, and this family has "
                f"{', '.join(sorted(self._capabilities.solvers))}. Use one of these"
            )
        if target_gate(role) is not None and (spec.stochastic or spec.solver != "euler"):
            raise ContractError(
                f"role {role.name!r} is a flow map, which goes from one step of the sampler to the "
                f"next, and the sampler has stochastic {spec.stochastic} and solver {spec.solver}. "
                "Use solver euler, without stochastic"
            )
        if spec.guidance_2 is not None and set(role.transformers) == {self._kind.modules[0]}:
            raise ContractError(
                f"the sampler has guidance_2 {spec.guidance_2:g}, and role {role.name!r} has one "
                "expert that it would never reach. Leave it out"
            )

    def _sampler_velocity(
        self,
        handle: RoleHandle,
        spec: SamplerSpec,
        cond: Condition,
        neg_cond: Condition | None,
        poll: Callable[[], None] | None,
        parts: PartShapes | None,
    ) -> sampler.Velocity:
        self.check_sampler(handle, spec)
        # The sampler makes its calls in order, one a step.
        following = iter(torch.tensor([*spec.sigmas()[1:], 0.0]) * TRAIN_STEPS)
        kept: dict[str, object] = {}

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            if poll is not None:
                poll()
            w = self.sampler_guidance(handle, spec, t)
            call = VelocityCall(like_pipeline=True, kept=kept, next_t=next(following), parts=parts)
            batched = self.pipeline_batches_guidance
            return self.guided_velocity(handle, x, t, cond, neg_cond, w, call=call, batched=batched)

        return velocity

    # -- latents and pixels -------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of one clip of this run."""
        return self._latent_shape

    def to_model_layout(self, latents: Tensor) -> Tensor:
        """Bring [B, C, T, H, W] to what the transformer takes; by default it is that already."""
        return latents

    def from_model_layout(self, latents: Tensor) -> Tensor:
        """Bring the transformer's output back to [B, C, T, H, W]."""
        return latents

    def normalize_latents(self, latents: LatentsT) -> LatentsT:
        """(z - mean) / std per channel, with the VAE's own statistics; fp32, or fp64 of fp64.

        A family whose latents have several parts overrides it.
        """
        return map_latents(self._normalize, latents)

    def _normalize(self, latents: Tensor) -> Tensor:
        wide = flow.widen(latents)
        return (wide - self._statistics.mean.to(wide)) / self._statistics.std.to(wide)

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """z std + mean per channel; fp32, or fp64 of fp64.

        A family whose pipeline computes it in another order overrides it, so that clips are the
        same bit for bit.
        """
        wide = flow.widen(latents)
        return wide * self._statistics.std.to(wide) + self._statistics.mean.to(wide)

    def encode(self, video: Tensor) -> Tensor:
        """Encode clips [B, 3, F, H_px, W_px] in [0, 1] to raw (not normalised) latents."""
        return self._codec.encode(video)

    def decode(self, latents: Latents) -> Tensor:
        """Decode normalised latents, of several parts the main one, to clips [B, 3, F, H_px, W_px]
        in [0, 1], without gradient."""
        return self._codec.decode(self.denormalize_latents(main_part(latents).detach()))

    # -- conditions ---------------------------------------------------------------------------

    def condition_fingerprint(self) -> Fingerprint:
        """Name encoders, tokenizers and settings; empty if there are none on this machine."""
        return {} if self._encoders is None else self._encoders.fingerprint()

    def latent_fingerprint(self) -> Fingerprint:
        """Name the VAE and its statistics; empty if it is not on this machine."""
        return latent_fingerprint(self._codec.source)

    def keep_encoders_loaded(self) -> AbstractContextManager[None]:
        """Keep encoders in memory within, for many encodings after each other.

        Outside, each encoding reads its encoder and frees it again: no run must hold 11 to 23 GB
        of UMT5-XXL beside its models because it encoded one prompt.
        """
        return contextlib.nullcontext() if self._encoders is None else self._encoders.keep_loaded()

    def free_components(self) -> None:
        """Drop the VAE from memory; the next use reads it again."""
        self._codec.free()


def checked_rollout(
    role: str,
    spec: SamplerSpec,
    exit_steps: Sequence[int],
    requires_grad: Sequence[bool] | None,
    *,
    chunks: int,
) -> list[bool]:
    """Return for each chunk whether its exit call is made with gradient.

    Raises:
        ContractError: a guided spec, or not one exit step and one ``requires_grad`` a chunk.
    """
    if spec.guided:
        raise ContractError(
            f"a rollout with guidance {spec.guidances}: it would learn through one call of "
            "two. A method refuses it before; use guidance 1"
        )
    gradients = [True] * chunks if requires_grad is None else list(requires_grad)
    if not len(exit_steps) == len(gradients) == chunks:
        raise ContractError(
            f"{len(exit_steps)} exit_steps and {len(gradients)} requires_grad for "
            f"{chunks} chunks of role {role!r}; there must be one of each a chunk"
        )
    # The sampler's set_grad_enabled(True) would override a caller's no_grad (the critic's turn).
    return [gradient and torch.is_grad_enabled() for gradient in gradients]


def device_of(bundle: ModelBundle) -> torch.device:
    """Find where the models of a run compute.

    Not where their parameters are: those of an offloaded role are on the CPU between calls, while
    buffers stay.
    """
    modules = [module for role in bundle.roles.values() for module in role.modules.values()]
    buffers = (buffer.device for module in modules for buffer in module.buffers())
    calls = (role.call_device for role in bundle.roles.values())
    return next(buffers, next(calls, bundle.device or torch.device("cpu")))
