"""``ToyAdapter``: calls toy networks, and records its calls."""

from __future__ import annotations

import itertools
from collections.abc import (
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from attrs import define, field, frozen
from distill_protocols import (
    EXIT_EMBEDDING,
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
    ExitConditioning,
    Fingerprint,
    JointLatents,
    LatentParts,
    Latents,
    LatentShape,
    LatentsT,
    ModelBundle,
    PartShapes,
    PredType,
    RowGenerators,
    SamplerSpec,
    Tangents,
    derive_seed,
    main_part,
    map_latents,
    one_tensor,
    restore_parts,
)
from torch import Tensor

from distill_conformance.toy.networks import (
    CAPABILITIES,
    CLIP,
    CONDITION_FINGERPRINT,
    LATENT_FINGERPRINT,
    LATENT_SHAPE,
    MEAN,
    SOUND,
    SOUND_SHAPE,
    SOUND_WEIGHT,
    STD,
    TEXT_DIM,
    ToyConfig,
    ToyExits,
)


@frozen
class ToyCall:
    """One model call; a guided one counts once."""

    role: str
    t: tuple[float, ...]
    with_gradient: bool
    cfg: float | None


@define(eq=False)
class ToyAdapter:
    """``DistillAdapter`` of toy models. A condition is ``{"text": [B, TEXT_DIM]}``."""

    bundle: ModelBundle
    config: ToyConfig = field(factory=ToyConfig)
    capabilities: Capabilities = CAPABILITIES
    calls: list[ToyCall] = field(factory=list)
    _past: dict[tuple[str, str], list[Tensor]] = field(factory=dict)
    _streams: Iterator[int] = field(factory=itertools.count)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        return LATENT_SHAPE

    @property
    def experts(self) -> None:
        return None

    @property
    def images(self) -> None:
        return None

    @property
    def causal(self) -> CausalRollout | None:
        return self if self.capabilities.supports_kv_cache else None

    @property
    def discriminators(self) -> Discriminating | None:
        return self if self.capabilities.supports_features else None

    @property
    def tangents(self) -> Tangents | None:
        return self if self.capabilities.supports_jvp else None

    @property
    def exits(self) -> ExitConditioning | None:
        return self if self.capabilities.supports_exits else None

    @property
    def flow_maps(self) -> None:
        """The toys are told t alone."""
        return None

    @property
    def parts(self) -> JointLatents | None:
        return self if self.config.sound else None

    def part_shapes(self, main: LatentShape) -> PartShapes:
        return {CLIP: main, SOUND: SOUND_SHAPE}

    @property
    def part_weights(self) -> Mapping[str, float]:
        return {CLIP: 1.0, SOUND: SOUND_WEIGHT}

    # -- noise schedule -------------------------------------------------------------------------

    def add_noise(self, x0: LatentsT, noise: LatentsT, t: Tensor) -> LatentsT:
        s = _over_pixels(t)
        return map_latents(lambda x0, noise: (1 - s) * x0 + s * noise, x0, noise)

    def pred_to_x0(
        self, pred: LatentsT, x_t: LatentsT, t: Tensor, pred_type: PredType = "v"
    ) -> LatentsT:
        s = _over_pixels(t)
        if pred_type == "x0":
            return pred
        if pred_type == "v":
            return map_latents(lambda v, x_t: x_t - s * v, pred, x_t)
        return map_latents(lambda eps, x_t: (x_t - s * eps) / (1 - s), pred, x_t)

    def target(
        self, x0: LatentsT, noise: LatentsT, t: Tensor, pred_type: PredType = "v"
    ) -> LatentsT:
        v = map_latents(torch.sub, noise, x0)
        return {"v": v, "x0": x0, "eps": noise}[pred_type]

    # -- model calls ----------------------------------------------------------------------------

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
        features: MutableMapping[int, Tensor | None] | None = None,
    ) -> LatentsT:
        if isinstance(x_t, LatentParts) != self.config.sound:
            raise ContractError(f"latents are {type(x_t).__name__}; sound is {self.config.sound}")
        self._check_inputs(main_part(x_t), t)
        w = 1.0 if cfg is None else cfg
        others = _means_of_others(x_t)

        def predict(part: Tensor) -> Tensor:
            past = others(part) if self.config.sound else self._past_of(role, part, caches)
            text = self._text(cond, len(part))
            if features is not None:
                self._fill_features(role, features, (part, t, text, past), w)
            v = self._guided(role, part, t, cond, neg_cond, w, past)
            if isinstance(caches, ChunkCall) and caches.store:
                self._past.setdefault((role, caches.stream), []).append(part.detach())
            return v

        v = map_latents(predict, x_t)
        with_gradient = main_part(v).requires_grad
        self.calls.append(ToyCall(role, tuple(t.flatten().tolist()), with_gradient, cfg))
        if fwd_pred_type == "v":
            return v
        s = _over_pixels(t)
        if fwd_pred_type == "x0":
            return map_latents(lambda x_t, v: x_t - s * v, x_t, v)
        return map_latents(lambda x_t, v: x_t + (1 - s) * v, x_t, v)

    def _guided(
        self,
        role: str,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        neg_cond: Condition | None,
        w: float,
        past: Tensor | None,
    ) -> Tensor:
        text = self._text(cond, len(x_t))
        if w == 1:
            return self._net(role)(x_t, t, text, past)
        if neg_cond is None:
            raise ConditioningError(
                f"guidance {w:g} without a negative condition; only 1 needs none"
            )
        v = self._net(role)(x_t, t, self._text(neg_cond, len(x_t)), past)
        return v if w == 0 else v + w * (self._net(role)(x_t, t, text, past) - v)

    def exit_count(self, role: str) -> int:
        embedding = self.bundle[role].modules.get(EXIT_EMBEDDING)
        return embedding.rows.shape[0] if isinstance(embedding, ToyExits) else 0

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
        rows, frames = len(x_t), x_t.shape[2]
        if not self.exit_count(role) or exits.shape not in {
            (b, n) for b in (1, rows) for n in (1, frames)
        }:
            raise ContractError(
                f"exits {list(exits.shape)} of role {role!r}, which knows "
                f"{self.exit_count(role)}: they must be [1 or B, 1 or T] of a role that knows some"
            )
        added = self.bundle[role].modules[EXIT_EMBEDDING](exits.expand(rows, -1))
        text = self._text(cond, rows)[:, None] + added
        text = text[:, 0] if exits.shape[1] == 1 else text
        return self.forward(role, x_t, t, Condition({"text": text}), fwd_pred_type=fwd_pred_type)

    def forward_jvp(
        self, role: str, x_t: Tensor, t: Tensor, cond: Condition, *, dx: Tensor, dt: Tensor
    ) -> tuple[Tensor, Tensor]:
        self._check_inputs(x_t, t)
        self.calls.append(ToyCall(role, tuple(t.flatten().tolist()), False, None))
        text = self._text(cond, len(x_t))
        with torch.no_grad():
            found = torch.func.jvp(
                lambda x, s: self._net(role)(x, s, text, self._past_of(role, x, None)),
                (x_t, t),
                (dx, dt),
            )
        return found[0], found[1]

    def discriminate(self, role: str, features: Mapping[int, Tensor]) -> Tensor:
        spec = self.bundle[role].discriminator
        if spec is None or set(spec.blocks) != features.keys():
            raise ContractError(
                f"role {role!r} and features of blocks {sorted(features)}: a discriminator reads "
                "those of its own blocks"
            )
        return self.bundle[role].modules["heads"]([features[block] for block in spec.blocks])

    def _check_inputs(self, x_t: Tensor, t: Tensor) -> None:
        self._check_latents(x_t)
        if t.dtype not in (torch.float32, torch.float64):
            raise ContractError(f"t is {t.dtype}; it must be fp32, as others round it")
        if t.shape not in {(len(x_t),), (len(x_t), x_t.shape[2])}:
            raise ContractError(
                f"t is {list(t.shape)}; it must be [{len(x_t)}] or [{len(x_t)}, {x_t.shape[2]}]"
            )

    def _check_latents(self, latents: Tensor) -> None:
        channels, _, height, width = LATENT_SHAPE
        if latents.dim() != 5 or (latents.shape[1], *latents.shape[3:]) != (
            channels,
            height,
            width,
        ):
            raise ContractError(
                f"latents are {list(latents.shape)}; they must be [B, {channels}, T, {height}, "
                f"{width}]"
            )

    def _net(self, role: str) -> Any:
        return self.bundle[role].modules["transformer"]

    def _text(self, cond: Condition, rows: int) -> Tensor:
        if "text" not in cond.tensors:
            raise ConditioningError(
                f"the condition holds {sorted(cond.tensors)}, and toy models read 'text'"
            )
        return cond.expand(rows).tensors["text"]

    def _fill_features(
        self,
        role: str,
        features: MutableMapping[int, Tensor | None],
        inputs: tuple[Tensor, Tensor, Tensor, Tensor],
        w: float,
    ) -> None:
        if w != 1 or role in self.capabilities.causal_roles:
            raise CapabilityError("features are of one call, of a role that is not causal")
        if features.keys() != {0}:
            raise ContractError(f"features of blocks {sorted(features)}: there is block 0 alone")
        features[0] = self._net(role).features(*inputs)

    # -- causal roles ---------------------------------------------------------------------------

    def chunks(self, role: str, frames: int | None = None) -> tuple[Chunk, ...]:
        frames = LATENT_SHAPE[1] if frames is None else frames
        if role in self.capabilities.causal_roles:
            return tuple(Chunk(i, 1) for i in range(frames))
        return (Chunk(0, frames),)

    def clear_caches(self, role: str, *, stream: str | None = None) -> None:
        for key in [k for k in self._past if k[0] == role and stream in (None, k[1])]:
            del self._past[key]

    def _past_of(self, role: str, x_t: Tensor, caches: ChunkCall | CleanPast | None) -> Tensor:
        """Mean of the frames before each frame, like ``x_t``; 0 where nothing is past."""
        if role not in self.capabilities.causal_roles:
            if caches is not None:
                raise CapabilityError(f"role {role!r} is not causal, so it has no past")
            return torch.zeros_like(x_t)
        if isinstance(caches, ChunkCall):
            stored = self._past.get((role, caches.stream), [])
            if len(stored) != caches.first_frame or x_t.shape[2] != 1:
                raise ContractError(
                    f"a chunk of {x_t.shape[2]} frames at frame {caches.first_frame}, and "
                    f"{len(stored)} are cached: chunks of one frame follow each other"
                )
            return torch.cat(stored, dim=2).mean(dim=2, keepdim=True) if stored else 0 * x_t
        frames = x_t if caches is None else caches.latents
        before = torch.cumsum(frames, dim=2) - frames
        counts = torch.arange(frames.shape[2]).clamp(min=1).view(1, 1, -1, 1, 1)
        return before / counts

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
        name = f"stream {next(self._streams)}"
        first = 0
        try:
            for noise in noises:
                with torch.no_grad():
                    clean = self._walk(
                        role, spec, noise, cond, neg_cond=neg_cond, generators=generators,
                        poll=poll, at=(first, name),
                    )  # fmt: skip
                    self._store(role, spec, clean, cond, generators, (first, name))
                yield clean
                first += noise.shape[2]
        finally:
            self.clear_caches(role, stream=name)

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
        parts: list[Tensor] = []
        flags = requires_grad or [True] * len(exit_steps)
        for frame, (step, trains) in enumerate(zip(exit_steps, flags, strict=True)):
            at = (first_frame + frame, stream)
            x0 = self._walk(
                role, spec, noise[:, :, frame : frame + 1], cond, generators=generators, poll=poll,
                at=at, exit_step=step, requires_grad=trains and torch.is_grad_enabled(),
            )  # fmt: skip
            parts.append(one_tensor(x0))
            self._store(role, spec, parts[-1], cond, generators, at)
        return torch.cat(parts, dim=2)

    def rebuild_past(self, role: str, cond: Condition, *, stream: str) -> None:
        """The past of a toy model is its frames, which know of no condition."""

    def past_state(self, role: str, *, stream: str) -> Mapping[str, object]:
        frames = self._past.get((role, stream), [])
        return {"frames": list(frames)} if frames else {}

    def load_past(
        self, role: str, state: Mapping[str, Any], cond: Condition, *, stream: str
    ) -> None:
        self.clear_caches(role, stream=stream)
        if state:
            self._past[role, stream] = list(state["frames"])

    def decode_stream(self, latents: Iterable[Tensor]) -> Generator[Tensor, None, None]:
        yield from map(self.decode, latents)

    # -- sampling -------------------------------------------------------------------------------

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
        frames = main_part(noise).shape[2]
        self._check_latents(main_part(noise))
        if frames != LATENT_SHAPE[1]:
            raise ContractError(f"noise of {frames} frames; clips have {LATENT_SHAPE[1]}")
        if on_step is not None and role in self.capabilities.causal_roles:
            raise ContractError(f"role {role!r} is causal: it has no x_t of a whole clip")
        chunks = self.chunks(role)
        with torch.no_grad():
            return self._walk_chunks(
                role, spec, noise, cond, neg_cond=neg_cond, generators=generators, poll=poll,
                on_step=on_step, exits=[spec.steps - 1] * len(chunks),
                requires_grad=[False] * len(chunks),
            )  # fmt: skip

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
        self._check_latents(main_part(noise))
        chunks = self.chunks(role, main_part(noise).shape[2])
        flags = [True] * len(chunks) if requires_grad is None else list(requires_grad)
        if not len(chunks) == len(exit_steps) == len(flags):
            raise ContractError(
                f"{len(exit_steps)} exit_steps and {len(flags)} requires_grad for {len(chunks)} "
                "chunks: there must be one a chunk"
            )
        if any(not 0 <= k < spec.steps for k in exit_steps):
            raise ContractError(f"exit steps {list(exit_steps)} of a sampler of {spec.steps}")
        if spec.guided:
            raise ContractError("a rollout with guidance would learn through one call of two")
        if on_step is not None and role in self.capabilities.causal_roles:
            raise ContractError(f"role {role!r} is causal: it has no x_t of a whole clip")
        return self._walk_chunks(
            role, spec, noise, cond, generators=generators, poll=poll, on_step=on_step,
            exits=exit_steps, requires_grad=[flag and torch.is_grad_enabled() for flag in flags],
        )  # fmt: skip

    def _walk_chunks(
        self,
        role: str,
        spec: SamplerSpec,
        noise: LatentsT,
        cond: Condition,
        *,
        exits: Sequence[int],
        requires_grad: Sequence[bool],
        generators: RowGenerators | None = None,
        **options: Any,
    ) -> LatentsT:
        causal = role in self.capabilities.causal_roles
        if not causal:
            return self._walk(
                role, spec, noise, cond, generators=generators, exit_step=exits[0],
                requires_grad=requires_grad[0], **options,
            )  # fmt: skip
        x = one_tensor(noise)
        chunks = self.chunks(role, x.shape[2])
        self.clear_caches(role, stream=ChunkCall.ROLLOUT)
        parts: list[Tensor] = []
        try:
            for chunk, step, trains in zip(chunks, exits, requires_grad, strict=True):
                at = (chunk.first, ChunkCall.ROLLOUT)
                parts.append(
                    self._walk(
                        role, spec, x[:, :, chunk.span], cond, generators=generators, at=at,
                        exit_step=step, requires_grad=trains, **options,
                    )
                )  # fmt: skip
                if chunk is not chunks[-1]:
                    self._store(role, spec, parts[-1], cond, generators, at)
        finally:
            self.clear_caches(role, stream=ChunkCall.ROLLOUT)
        return restore_parts(torch.cat(parts, dim=2), noise)

    def _walk(
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
        at: tuple[int, str] | None = None,
        exit_step: int | None = None,
        requires_grad: bool = False,
    ) -> LatentsT:
        """Return one chunk from noise to the x0 of the exit step; ``at``: its first frame and
        stream."""
        if spec.solver not in self.capabilities.solvers:
            raise CapabilityError(f"solver {spec.solver} is none of this family's. Use euler")
        if spec.stochastic and spec.steps > 1:
            generators = _one_a_row(generators, noise)
        caches = None if at is None else ChunkCall(first_frame=at[0], stream=at[1])
        last = spec.steps - 1 if exit_step is None else exit_step
        x_t = noise
        for step, (now, after) in enumerate(itertools.pairwise((*spec.sigmas(), 0.0))):
            if poll is not None:
                poll()
            if on_step is not None:
                on_step(step, x_t)
            t = torch.full((len(noise),), 1000 * now)
            with torch.set_grad_enabled(requires_grad and step == last):
                v = self.forward(
                    role, x_t, t, cond, neg_cond=neg_cond, cfg=spec.guidance, caches=caches
                )
                x0 = self.pred_to_x0(v, x_t, t)
            if step == last:
                return x0
            if spec.stochastic and generators is not None:
                fresh = map_latents(_drawn_like(generators), noise)
                x_t = self.add_noise(x0, fresh, torch.full_like(t, 1000 * after))
            else:
                x_t = map_latents(lambda x_t, v, ds=after - now: x_t + ds * v, x_t, v)
        raise AssertionError("a spec has at least one step")

    @torch.no_grad()
    def _store(
        self,
        role: str,
        spec: SamplerSpec,
        clean: Tensor,
        cond: Condition,
        generators: RowGenerators | None,
        at: tuple[int, str],
    ) -> None:
        t = torch.full((len(clean),), spec.context_noise)
        if spec.context_noise > 0:
            fresh = _one_a_row(generators, clean).normal(clean.shape[1:])
            clean = self.add_noise(clean, fresh, t)
        call = ChunkCall(first_frame=at[0], stream=at[1], store=True)
        self.forward(role, clean.detach(), t, cond, caches=call)

    # -- latents and conditions -----------------------------------------------------------------

    def to_model_layout(self, latents: Tensor) -> Tensor:
        return latents

    def from_model_layout(self, latents: Tensor) -> Tensor:
        return latents

    def normalize_latents(self, latents: LatentsT) -> LatentsT:
        return map_latents(lambda latents: (latents - MEAN) / STD, latents)

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        return latents * STD + MEAN

    def encode(self, video: Tensor) -> Tensor:
        return torch.logit(video, eps=1e-6)

    @torch.no_grad()
    def decode(self, latents: Latents) -> Tensor:
        return torch.sigmoid(self.denormalize_latents(main_part(latents)))

    def encode_condition(self, raw_cond: Sequence[str]) -> Condition:
        rows = [
            torch.Generator().manual_seed(derive_seed(0, "toy.text", prompt)) for prompt in raw_cond
        ]
        return Condition({"text": RowGenerators(rows).normal((TEXT_DIM,))})

    def encode_neg_condition(self, raw_neg_cond: str) -> Condition:
        return self.encode_condition([raw_neg_cond])

    def condition_fingerprint(self) -> Fingerprint:
        return CONDITION_FINGERPRINT

    def latent_fingerprint(self) -> Fingerprint:
        return LATENT_FINGERPRINT

    def keep_encoders_loaded(self) -> AbstractContextManager[object]:
        return nullcontext()


def _over_pixels(t: Tensor) -> Tensor:
    if t.dim() == 2:
        return (t / 1000)[:, None, :, None, None]
    return (t / 1000).view(-1, 1, 1, 1, 1)


def _means_of_others(x_t: Latents) -> Callable[[Tensor], Tensor]:
    """Return what a part reads of the others: their mean over all cells, like the part."""
    parts = x_t.tensors.values() if isinstance(x_t, LatentParts) else ()
    means = [part.mean(dim=(2, 3, 4), keepdim=True) for part in parts]

    def of(part: Tensor) -> Tensor:
        others = [mean for mean, one in zip(means, parts, strict=True) if one is not part]
        return torch.stack(others).sum(dim=0).expand_as(part)

    return of


def _drawn_like(generators: RowGenerators) -> Callable[[Tensor], Tensor]:
    return lambda part: generators.normal(part.shape[1:])


def _one_a_row(generators: RowGenerators | None, noise: Latents) -> RowGenerators:
    if generators is None or len(generators) != len(noise):
        count = "no" if generators is None else str(len(generators))
        raise ContractError(f"{count} generators for {len(noise)} rows; there must be one a row")
    return generators
