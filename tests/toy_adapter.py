"""A small model behind the whole adapter contract, and the parts of a run around it.

It counts its calls, so that tests can ask who was called, at which t, and with gradient or not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, MutableMapping, Sequence

import torch
from attrs import define, evolve, field, frozen
from distill_protocols import (
    Batch,
    Capabilities,
    Chunk,
    ChunkCall,
    CleanPast,
    Condition,
    ConditioningError,
    DiscriminatorSpec,
    ExpertRouting,
    ImageConditioning,
    ModelBundle,
    PredType,
    RoleHandle,
    RowGenerators,
    SamplerSpec,
)
from torch import Tensor, nn

LATENT_SHAPE = (3, 2, 4, 4)
TEXT_DIM = 5
MEAN, STD = 0.5, 2.0
ABLE = Capabilities(
    supports_cfg=True, supports_decode=True, supports_features=True, supports_jvp=True,
    supported_pred_types=frozenset({"v", "x0"}),
)  # fmt: skip
CAUSAL = evolve(
    ABLE,
    supports_kv_cache=True,
    supports_teacher_forcing=True,
    supports_frame_times=True,
    causal_roles=frozenset({"student"}),
)
"""The student makes frame after frame."""


class ToyNet(nn.Module):
    """v of a small per-pixel network that reads x_t, t [B] or [B, T], and the text."""

    def __init__(self, seed: int, width: int = 24) -> None:
        super().__init__()
        channels = LATENT_SHAPE[0]
        self.inner = nn.Linear(channels + 1 + TEXT_DIM, width)
        self.outer = nn.Linear(width, channels)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.outer(self.features(x_t, t, text).movedim(1, -1)).movedim(-1, 1)

    def features(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """[B, width, T, H, W]: of its one block."""
        pixels = x_t.movedim(1, -1)
        size = pixels.shape[:-1]
        times = (t if t.dim() == 2 else t[:, None])[:, :, None, None, None] / 1000
        texts = text[:, None, None, None]
        rows = [times.expand(*size, 1), texts.expand(*size, text.shape[-1])]
        return torch.tanh(self.inner(torch.cat([pixels, *rows], -1))).movedim(-1, 1)


class ToyHeads(nn.Module):
    """Two logits of a clip, from the mean of its features and of their squares."""

    def __init__(self, seed: int, width: int = 24) -> None:
        super().__init__()
        self.outer = nn.Linear(2 * width, 2)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))

    def forward(self, features: Tensor) -> Tensor:
        cells = features.flatten(2)
        return self.outer(torch.cat([cells.mean(dim=2), cells.square().mean(dim=2)], dim=1))


@frozen
class Call:
    """One model call: ``guided`` counts as one."""

    role: str
    t: tuple[float, ...]
    with_gradient: bool
    cfg: float | None


@define(eq=False)
class ToyAdapter:
    """Every call of the contract; text [B, TEXT_DIM] is the only conditioning tensor."""

    bundle: ModelBundle
    capabilities: Capabilities = ABLE
    calls: list[Call] = field(factory=list)
    latent_shape: tuple[int, int, int, int] = LATENT_SHAPE

    @property
    def experts(self) -> ExpertRouting | None:
        return None

    @property
    def images(self) -> ImageConditioning | None:
        return None

    @property
    def causal(self) -> ToyAdapter | None:
        return self if self.capabilities.supports_kv_cache else None

    @property
    def discriminators(self) -> ToyAdapter | None:
        return self if self.capabilities.supports_features else None

    @property
    def tangents(self) -> ToyAdapter | None:
        return self if self.capabilities.supports_jvp else None

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        s = _over_pixels(t)
        return (1 - s) * x0 + s * noise

    def pred_to_x0(self, pred: Tensor, x_t: Tensor, t: Tensor, pred_type: PredType = "v") -> Tensor:
        assert pred_type == "v"
        return x_t - _over_pixels(t) * pred

    def target(self, x0: Tensor, noise: Tensor, t: Tensor, pred_type: PredType = "v") -> Tensor:
        assert pred_type == "v"
        return noise - x0

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
        by_frame = self.capabilities.supports_frame_times and t.shape == (len(x_t), x_t.shape[2])
        assert by_frame or t.shape == (len(x_t),)
        assert t.dtype == torch.float32
        module = self.bundle[role].modules["transformer"]
        velocity = module(x_t, t, cond.tensors["text"])
        if features is not None:
            assert features.keys() == {0}
            assert cfg in (None, 1)
            features[0] = module.features(x_t, t, cond.tensors["text"])
        if cfg is not None and cfg != 1:
            if neg_cond is None:
                raise ConditioningError("guidance without a negative condition")
            negative = module(x_t, t, neg_cond.expand(len(x_t)).tensors["text"])
            velocity = negative + cfg * (velocity - negative)
        self.calls.append(Call(role, tuple(t.flatten().tolist()), velocity.requires_grad, cfg))
        return velocity if fwd_pred_type == "v" else self.pred_to_x0(velocity, x_t, t)

    def forward_jvp(
        self, role: str, x_t: Tensor, t: Tensor, cond: Condition, *, dx: Tensor, dt: Tensor
    ) -> tuple[Tensor, Tensor]:
        module = self.bundle[role].modules["transformer"]
        self.calls.append(Call(role, tuple(t.tolist()), False, None))
        with torch.no_grad():
            return torch.func.jvp(
                lambda x, s: module(x, s, cond.tensors["text"]), (x_t, t), (dx, dt)
            )

    def discriminate(self, role: str, features: Mapping[int, Tensor]) -> Tensor:
        return self.bundle[role].modules["heads"](features[0])

    def to_model_layout(self, latents: Tensor) -> Tensor:
        return latents

    def from_model_layout(self, latents: Tensor) -> Tensor:
        return latents

    def normalize_latents(self, latents: Tensor) -> Tensor:
        return (latents - MEAN) / STD

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        return latents * STD + MEAN

    def decode(self, latents: Tensor) -> Tensor:
        return torch.sigmoid(latents)

    def encode_condition(self, raw_cond: Sequence[str]) -> Condition:
        raise NotImplementedError

    def encode_neg_condition(self, raw_neg_cond: str) -> Condition:
        raise NotImplementedError

    def condition_fingerprint(self) -> dict[str, str]:
        return {"toy.text": "1"}

    def latent_fingerprint(self) -> dict[str, str]:
        return {"toy.vae": "1"}

    def chunks(self, role: str, frames: int | None = None) -> tuple[Chunk, ...]:
        frames = LATENT_SHAPE[1] if frames is None else frames
        if role in self.capabilities.causal_roles:
            return tuple(Chunk(i, 1) for i in range(frames))
        return (Chunk(0, frames),)

    def clear_caches(self, role: str, *, stream: str | None = None) -> None: ...

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
    ) -> Tensor:
        sigmas = (*spec.sigmas(), 0.0)
        x_t = noise
        for now, then in itertools.pairwise(sigmas):
            if poll is not None:
                poll()
            t = torch.full((len(noise),), 1000 * now)
            velocity = self.forward(role, x_t, t, cond, neg_cond=neg_cond, cfg=spec.guidance)
            if spec.stochastic and then > 0:
                x0 = self.pred_to_x0(velocity, x_t, t)
                assert generators is not None
                fresh = generators.normal(noise.shape[1:])
                x_t = self.add_noise(x0, fresh, torch.full_like(t, 1000 * then))
            else:
                x_t = x_t + (then - now) * velocity
        return x_t

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
        chunks = self.chunks(role, noise.shape[2])
        parts = zip(chunks, exit_steps, requires_grad or [True] * len(exit_steps), strict=True)
        clips = [
            self._rolled(role, spec, noise[:, :, chunk.span], cond, k, learn, generators, poll)
            for chunk, k, learn in parts
        ]
        return torch.cat(clips, dim=2)

    def _rolled(
        self,
        role: str,
        spec: SamplerSpec,
        noise: Tensor,
        cond: Condition,
        exit_step: int,
        learn: bool,
        generators: RowGenerators | None,
        poll: Callable[[], None] | None,
    ) -> Tensor:
        """One chunk, which here sees no past."""
        sigmas, x_t = spec.sigmas(), noise
        for step in range(exit_step + 1):
            if poll is not None:
                poll()
            t = torch.full((len(noise),), 1000 * sigmas[step])
            with torch.set_grad_enabled(torch.is_grad_enabled() and learn and step == exit_step):
                x0 = self.forward(role, x_t, t, cond, fwd_pred_type="x0")
            if step == exit_step:
                return x0
            after = torch.full_like(t, 1000 * sigmas[step + 1])
            if spec.stochastic:
                assert generators is not None
                x_t = self.add_noise(x0, generators.normal(noise.shape[1:]), after)
            else:
                v = (x_t - x0) / sigmas[step]
                x_t = x_t + (sigmas[step + 1] - sigmas[step]) * v
        raise AssertionError


@frozen
class ToyConditioning:
    """A provider with a negative condition, or without."""

    has_negative: bool = True

    def negative(self) -> Condition:
        if not self.has_negative:
            raise ConditioningError("this run has no negative condition")
        return Condition({"text": torch.full((1, TEXT_DIM), -0.5)})

    def encode(self, prompts: Sequence[str], images: Tensor | None = None) -> Condition:
        return Condition({"text": torch.zeros(len(prompts), TEXT_DIM)})


def toy_bundle(*, lr: float = 1e-2, heads_on: str = "teacher", **seeds: int) -> ModelBundle:
    """Roles by name, each with the weights of its seed; all but ``teacher`` train.

    ``discriminator`` is heads on ``heads_on``.
    """
    roles = {}
    for name, seed in seeds.items():
        heads = DiscriminatorSpec(on=heads_on, blocks=(0,)) if name == "discriminator" else None
        key, module = ("transformer", ToyNet(seed)) if heads is None else ("heads", ToyHeads(seed))
        trainable = name != "teacher"
        role = RoleHandle(
            name=name, modules={key: module}, trainable=trainable, discriminator=heads
        )
        if trainable:
            optimizer = torch.optim.AdamW(module.parameters(), lr=lr)
            role.optimizers[key] = optimizer
            role.schedulers[key] = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        roles[name] = role
    return ModelBundle(roles)


def toy_batch(size: int, seed: int = 0) -> Batch:
    """Random latents and texts."""
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        latents=torch.randn(size, *LATENT_SHAPE, generator=generator),
        cond=Condition({"text": torch.randn(size, TEXT_DIM, generator=generator)}),
        ids=tuple(f"sample-{i}" for i in range(size)),
    )


def rows(batch: Batch, start: int, stop: int) -> Batch:
    """Some samples of a batch."""
    part = slice(start, stop)
    return Batch(latents=batch.latents[part], cond=batch.cond[part], ids=batch.ids[part])


def gradients(bundle: ModelBundle) -> dict[str, list[Tensor]]:
    """Gradients by role; a role that none reached has an empty list."""
    return {
        name: [p.grad.clone() for m in role.modules.values() for p in m.parameters()
               if p.grad is not None]
        for name, role in bundle.roles.items()
    }  # fmt: skip


def _over_pixels(t: Tensor) -> Tensor:
    if t.dim() == 2:
        return (t / 1000)[:, None, :, None, None]
    return (t / 1000).view(-1, 1, 1, 1, 1)
