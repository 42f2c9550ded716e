"""A family of tiny models behind the whole contract, for tests of methods.

It needs no files and no model library, and a call takes a fraction of a millisecond. The roles
have any name, and may be causal or discriminators; ``ToyAdapter`` records its
calls, so that a test can ask who was called, at which t, and with gradient or not.

It passes ``AdapterSuite`` itself.
"""

from __future__ import annotations

import itertools
import json
import math
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
from pathlib import Path
from typing import Any, ClassVar

import torch
from attrs import define, evolve, field, frozen
from distill_protocols import (
    CONTRACT_VERSION,
    Batch,
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
    DiscriminatorSpec,
    Exporter,
    ExportRecord,
    ExportRequest,
    FamilyPlugin,
    Fingerprint,
    ModelBundle,
    ModulePlan,
    PredType,
    Problem,
    RoleHandle,
    RoleNeed,
    RolePlan,
    RoleSpec,
    RowGenerators,
    SamplerSpec,
    Tangents,
    TensorInfo,
    TensorPlan,
    TensorWeights,
    WeightsError,
    WeightSource,
    derive_seed,
)
from distill_protocols.plugins import EMPTY
from distill_runtime.safetensors_files import write_safetensors
from torch import Tensor, nn

LATENT_SHAPE = (3, 2, 4, 4)
TEXT_DIM = 5
WIDTH = 24
MEAN, STD = 0.5, 2.0
LATENT_FINGERPRINT: Fingerprint = {"vae.statistics": f"{MEAN:g}, {STD:g}"}
CONDITION_FINGERPRINT: Fingerprint = {"text_encoder.weights": "a function of the prompt"}
CAPABILITIES = Capabilities(
    supports_cfg=True,
    supports_decode=True,
    supports_features=True,
    supports_frame_times=True,
    supports_jvp=True,
    supported_pred_types=frozenset({"v", "x0", "eps"}),
)
"""Of a run without causal roles."""


@frozen(kw_only=True)
class ToyConfig:
    """A run of toy models.

    Attributes:
        causal_roles: roles that make frame after frame, each a chunk of its own.
    """

    causal_roles: frozenset[str] = field(default=frozenset(), converter=frozenset)


# -- models -----------------------------------------------------------------------------------


class ToyNet(nn.Module):
    """v of a network of one hidden layer that works on each pixel by itself.

    It reads x_t, t, the text, and of a causal role the mean of the frames that are past (0 where
    none is given).
    """

    def __init__(self) -> None:
        super().__init__()
        channels = LATENT_SHAPE[0]
        self.inner = nn.Linear(2 * channels + 1 + TEXT_DIM, WIDTH)
        self.outer = nn.Linear(WIDTH, channels)

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor, past: Tensor | None = None) -> Tensor:
        """v [B, C, T, H, W] at t [B] or [B, T], from ``past`` like ``x_t``."""
        return self.velocity(self.features(x_t, t, text, past))

    def features(self, x_t: Tensor, t: Tensor, text: Tensor, past: Tensor | None = None) -> Tensor:
        """[B, WIDTH, T, H, W] of its only block."""
        past = torch.zeros_like(x_t) if past is None else past
        pixels = torch.cat([x_t, past], dim=1).movedim(1, -1)
        size = pixels.shape[:-1]
        times = (t if t.dim() == 2 else t[:, None])[:, :, None, None, None] / 1000
        texts = text[:, None, None, None]
        rows = [times.expand(*size, 1), texts.expand(*size, text.shape[-1])]
        return torch.tanh(self.inner(torch.cat([pixels, *rows], -1))).movedim(-1, 1)

    def velocity(self, features: Tensor) -> Tensor:
        """v from ``features``."""
        return self.outer(features.movedim(1, -1)).movedim(-1, 1)


class ToyHeads(nn.Module):
    """A logit of a clip for each block, from the means of its features and of their squares."""

    def __init__(self, blocks: int = 1) -> None:
        super().__init__()
        self.outer = nn.ModuleList(nn.Linear(2 * WIDTH, 1) for _ in range(blocks))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits [B, heads] of features [B, WIDTH, T, H, W], one a head."""
        cells = [block.flatten(2) for block in features]
        moments = [torch.cat([c.mean(dim=2), c.square().mean(dim=2)], dim=1) for c in cells]
        return torch.cat([head(m) for head, m in zip(self.outer, moments, strict=True)], dim=1)


# -- adapter ----------------------------------------------------------------------------------


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
    config: ToyConfig = ToyConfig()
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

    # -- noise schedule -------------------------------------------------------------------------

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        s = _over_pixels(t)
        return (1 - s) * x0 + s * noise

    def pred_to_x0(self, pred: Tensor, x_t: Tensor, t: Tensor, pred_type: PredType = "v") -> Tensor:
        s = _over_pixels(t)
        if pred_type == "x0":
            return pred
        return x_t - s * pred if pred_type == "v" else (x_t - s * pred) / (1 - s)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor, pred_type: PredType = "v") -> Tensor:
        return {"v": noise - x0, "x0": x0, "eps": noise}[pred_type]

    # -- model calls ----------------------------------------------------------------------------

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
        features: MutableMapping[int, Tensor | None] | None = None,
    ) -> Tensor:
        self._check_inputs(x_t, t)
        w = 1.0 if cfg is None else cfg
        past = self._past_of(role, x_t, caches)
        text = self._text(cond, len(x_t))
        if features is not None:
            self._fill_features(role, features, (x_t, t, text, past), w)
        if w == 1:
            v = self._net(role)(x_t, t, text, past)
        else:
            if neg_cond is None:
                raise ConditioningError(
                    f"guidance {w:g} without a negative condition; only 1 needs none"
                )
            v = self._net(role)(x_t, t, self._text(neg_cond, len(x_t)), past)
            if w != 0:
                v = v + w * (self._net(role)(x_t, t, text, past) - v)
        if isinstance(caches, ChunkCall) and caches.store:
            self._past.setdefault((role, caches.stream), []).append(x_t.detach())
        self.calls.append(ToyCall(role, tuple(t.flatten().tolist()), v.requires_grad, cfg))
        if fwd_pred_type == "v":
            return v
        s = _over_pixels(t)
        return x_t - s * v if fwd_pred_type == "x0" else x_t + (1 - s) * v

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

    # -- sampling -------------------------------------------------------------------------------

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
        self._check_latents(noise)
        if noise.shape[2] != LATENT_SHAPE[1]:
            raise ContractError(f"noise of {noise.shape[2]} frames; clips have {LATENT_SHAPE[1]}")
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
        noise: Tensor,
        cond: Condition,
        *,
        exit_steps: Sequence[int],
        requires_grad: Sequence[bool] | None = None,
        generators: RowGenerators | None = None,
        poll: Callable[[], None] | None = None,
    ) -> Tensor:
        self._check_latents(noise)
        chunks = self.chunks(role, noise.shape[2])
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
        return self._walk_chunks(
            role, spec, noise, cond, generators=generators, poll=poll, exits=exit_steps,
            requires_grad=[flag and torch.is_grad_enabled() for flag in flags],
        )  # fmt: skip

    def _walk_chunks(
        self,
        role: str,
        spec: SamplerSpec,
        noise: Tensor,
        cond: Condition,
        *,
        exits: Sequence[int],
        requires_grad: Sequence[bool],
        generators: RowGenerators | None = None,
        **options: Any,
    ) -> Tensor:
        causal = role in self.capabilities.causal_roles
        chunks = self.chunks(role, noise.shape[2])
        if causal:
            self.clear_caches(role, stream=ChunkCall.ROLLOUT)
        parts: list[Tensor] = []
        try:
            for chunk, step, trains in zip(chunks, exits, requires_grad, strict=True):
                at = (chunk.first, ChunkCall.ROLLOUT) if causal else None
                parts.append(
                    self._walk(
                        role, spec, noise[:, :, chunk.span], cond, generators=generators, at=at,
                        exit_step=step, requires_grad=trains, **options,
                    )
                )  # fmt: skip
                if at is not None and chunk is not chunks[-1]:
                    self._store(role, spec, parts[-1], cond, generators, at)
        finally:
            if causal:
                self.clear_caches(role, stream=ChunkCall.ROLLOUT)
        return torch.cat(parts, dim=2)

    def _walk(
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
        at: tuple[int, str] | None = None,
        exit_step: int | None = None,
        requires_grad: bool = False,
    ) -> Tensor:
        """One chunk from noise to the x0 of the exit step; ``at``: its first frame and stream."""
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
                fresh = generators.normal(noise.shape[1:])
                x_t = self.add_noise(x0, fresh, torch.full_like(t, 1000 * after))
            else:
                x_t = x_t + (after - now) * v
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

    def normalize_latents(self, latents: Tensor) -> Tensor:
        return (latents - MEAN) / STD

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        return latents * STD + MEAN

    def encode(self, video: Tensor) -> Tensor:
        return torch.logit(video, eps=1e-6)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return torch.sigmoid(self.denormalize_latents(latents))

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


def _one_a_row(generators: RowGenerators | None, noise: Tensor) -> RowGenerators:
    if generators is None or len(generators) != len(noise):
        count = "no" if generators is None else str(len(generators))
        raise ContractError(f"{count} generators for {len(noise)} rows; there must be one a row")
    return generators


# -- family -----------------------------------------------------------------------------------


class ToyFamily(FamilyPlugin[ToyConfig]):
    """Toy models. The path of a role is any text; its weights are a function of it and the seed."""

    name: ClassVar[str] = "toy"
    help: ClassVar[str] = "networks of a thousand weights, for tests"
    contract: ClassVar[int] = CONTRACT_VERSION
    config_class: ClassVar[type] = ToyConfig

    def capabilities(self, config: ToyConfig) -> Capabilities:
        if not config.causal_roles:
            return CAPABILITIES
        return evolve(
            CAPABILITIES,
            supports_kv_cache=True,
            supports_teacher_forcing=True,
            causal_roles=config.causal_roles,
        )

    def role_options(self, config: ToyConfig) -> tuple[str, ...]:
        return ("heads",)

    def export_formats(self) -> Mapping[str, str]:
        return {"toy": "model.safetensors and sampler.json"}

    def role_problems(self, role: RoleSpec, config: ToyConfig) -> Iterable[Problem]:
        return ()

    def latent_shape(self, config: ToyConfig, *, source: str) -> tuple[int, int, int, int]:
        return LATENT_SHAPE

    def latent_tokens(self, config: ToyConfig, *, source: str) -> int:
        return math.prod(LATENT_SHAPE[1:])

    def condition_shapes(self, config: ToyConfig, *, source: str) -> Mapping[str, tuple[int, ...]]:
        return {"text": (TEXT_DIM,)}

    def fingerprint(self, config: ToyConfig, *, source: str) -> Fingerprint:
        return {**LATENT_FINGERPRINT, **CONDITION_FINGERPRINT}

    def plan(self, role: RoleSpec, config: ToyConfig) -> RolePlan:
        plans = [
            ModulePlan(
                name=key,
                architecture=type(module).__name__,
                tensors=tuple(
                    TensorPlan(
                        name=name,
                        shape=tuple(parameter.shape),
                        dtype=parameter.dtype,
                        trained=role.trainable,
                    )
                    for name, parameter in module.named_parameters()
                ),
            )
            for key, module in _build_modules(role).items()
        ]
        return RolePlan(role=role.name, source=role.path, modules=tuple(plans), present=True)

    def load(
        self,
        roles: Sequence[RoleSpec],
        config: ToyConfig,
        *,
        device: torch.device,
        seed: int = 0,
        weights: Mapping[str, Mapping[str, WeightSource]] = EMPTY,
        shard: Callable[[RoleHandle], None] = lambda role: None,
    ) -> ModelBundle:
        handles = {}
        for spec in roles:
            handle = RoleHandle(
                name=spec.name,
                modules=_draw_modules(spec, seed),
                trainable=spec.trainable,
                precision=spec.precision,
                discriminator=spec.heads,
            )
            for key, source in weights.get(spec.name, {}).items():
                _fill_module(handle.modules[key], source)
            shard(handle)
            handles[spec.name] = handle
        return ModelBundle(handles)

    def weights(self, path: str) -> Mapping[str, WeightSource]:
        spec = RoleSpec(name="weights", path=path, trainable=False)
        modules = _draw_modules(spec, seed=0)
        return {key: TensorWeights(path, module.state_dict()) for key, module in modules.items()}

    def adapter(self, bundle: ModelBundle, config: ToyConfig, *, source: str) -> ToyAdapter:
        missing = sorted(config.causal_roles - bundle.roles.keys())
        if missing:
            raise ContractError(f"causal_roles names {missing}, which are no roles of the run")
        return ToyAdapter(bundle, config, self.capabilities(config))

    def exporter(self, config: ToyConfig, *, source: str) -> Exporter:
        return ToyExporter()


def _build_modules(spec: RoleSpec) -> dict[str, nn.Module]:
    """Modules on the meta device, so that their constructors draw from no generator."""
    with torch.device("meta"):
        if spec.heads is not None:
            return {"heads": ToyHeads(len(spec.heads.blocks))}
        return {"transformer": ToyNet()}


def _draw_modules(spec: RoleSpec, seed: int) -> dict[str, nn.Module]:
    modules = {key: module.to_empty(device="cpu") for key, module in _build_modules(spec).items()}
    generator = torch.Generator().manual_seed(derive_seed(seed, "toy", spec.path))
    with torch.no_grad():
        for module in modules.values():
            for parameter in module.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return modules


def _fill_module(module: nn.Module, source: WeightSource) -> None:
    names = module.state_dict().keys()
    wrong = sorted(names ^ source.describe().keys())
    if wrong:
        raise WeightsError(f"{source.where}: {', '.join(wrong)} are missing or unexpected")
    module.load_state_dict(source.read(names))


class ToyExporter:
    """Writes one safetensors file, and the sampler as JSON."""

    def export(
        self,
        role: RoleSpec,
        weights: Mapping[str, WeightSource],
        folder: Path,
        request: ExportRequest,
    ) -> ExportRecord:
        source = weights["transformer"]
        folder.mkdir(parents=True)
        infos: Mapping[str, TensorInfo] = source.describe()
        write_safetensors(
            folder / "model.safetensors", infos, lambda name: source.read([name])[name]
        )
        sampler = {"steps": request.sampler.steps, "stochastic": request.sampler.stochastic}
        (folder / "sampler.json").write_text(json.dumps(sampler))
        return {"notes": []}

    def verify(
        self,
        role: RoleSpec,
        weights: Mapping[str, WeightSource],
        folder: Path,
        request: ExportRequest,
    ) -> ExportRecord:
        source = weights["transformer"]
        expected = source.read(source.describe())
        data = (folder / "model.safetensors").read_bytes()
        missing = [
            name
            for name, tensor in expected.items()
            if tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() not in data
        ]
        if missing:
            raise WeightsError(f"{folder}: {', '.join(missing)} differ from the weights")
        return {"notes": []}


# -- parts of a method's test -----------------------------------------------------------------


@frozen
class ToyConditioning:
    """A provider whose negative condition is not zero, or one that has none."""

    has_negative: bool = True

    def negative(self) -> Condition:
        if not self.has_negative:
            raise ConditioningError("this run has no negative condition")
        return Condition({"text": torch.full((1, TEXT_DIM), -0.5)})

    def encode(self, prompts: Sequence[str], images: Tensor | None = None) -> Condition:
        return Condition({"text": torch.zeros(len(prompts), TEXT_DIM)})


def toy_models(
    needs: Sequence[RoleNeed], *, seed: int = 0, causal_roles: Iterable[str] = ()
) -> tuple[ToyAdapter, ModelBundle]:
    """Roles as a method needs them, each with weights of its own, and optimizers of those that
    are trained.

    Args:
        needs: ``MethodConfig.roles``; a discriminator reads the first of its ``features_of``.
    """
    config = ToyConfig(causal_roles=causal_roles)
    specs = [
        RoleSpec(
            name=need.name,
            path=need.name,
            trainable=need.trainable,
            heads=DiscriminatorSpec(on=need.features_of[0], blocks=(0,))
            if need.features_of
            else None,
        )
        for need in needs
    ]
    family = ToyFamily()
    bundle = family.load(specs, config, device=torch.device("cpu"), seed=seed)
    for role in bundle.roles.values():
        add_optimizers(role)
    return family.adapter(bundle, config, source="toy"), bundle


def add_optimizers(role: RoleHandle, *, lr: float = 1e-3, decay: float = 0.98) -> None:
    """Give each trained module an AdamW, whose learning rate is multiplied by ``decay`` at every
    step."""
    for key in role.modules if role.trainable else ():
        optimizer = torch.optim.AdamW(role.trained_parameters(key).values(), lr=lr)
        role.optimizers[key] = optimizer
        role.schedulers[key] = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)


def toy_batch(size: int, seed: int = 0, *, levels: int = 0) -> Batch:
    """Random latents and texts; row n is the same in a batch of any size.

    Args:
        levels: states of a teacher's trajectory that each sample holds.
    """
    rows = RowGenerators.seeded(seed, "toy.batch", range(size))
    return Batch(
        latents=rows.normal(LATENT_SHAPE),
        cond=Condition({"text": rows.normal((TEXT_DIM,))}),
        ids=tuple(f"sample-{i}" for i in range(size)),
        trajectory=rows.normal((levels, *LATENT_SHAPE)) if levels else None,
    )
