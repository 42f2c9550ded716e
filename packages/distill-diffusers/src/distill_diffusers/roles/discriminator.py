"""Discriminators: small heads on hidden states of a transformer's blocks.

Letters: B batch, D width of the transformer, T, H and W a clip in patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from attrs import frozen
from distill_protocols import (
    ContractError,
    DiscriminatorSpec,
    ModulePlan,
    Problem,
    RoleHandle,
    RoleSpec,
    TensorInfo,
    TensorPlan,
    WeightSource,
    derive_seed,
)
from torch import Tensor, nn

from distill_diffusers.architecture import block_problem

HEADS = "heads"
"""The one module of such a role."""
_GROUP_CHANNELS = 16
"""Channels that are normalised together, where the width allows it: a single one would always be 0
on a clip of a single patch."""


class Head(nn.Module):
    """Turn hidden states [B, D, T, H, W] of one block into one logit a clip [B].

    Tokens are brought to one scale first, as single channels of a DiT's hidden states are a
    hundred times the others. Then they are narrowed, mixed with their neighbours in space and time
    twice, and the logits of what is left are averaged. Norms are of one sample: no logit depends
    on a clip's neighbours in the batch. All in fp32: of clips as small as a kernel, oneDNN's bf16
    convolution (torch 2.15, on the CPU) gives gradients that are not finite.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        groups = math.gcd(width, max(1, width // _GROUP_CHANNELS))
        self.features = features
        self.narrow = nn.Conv3d(features, width, 1)
        self.near = nn.Conv3d(width, width, 3, stride=(1, 2, 2), padding=1)
        self.near_norm = nn.GroupNorm(groups, width)
        self.far = nn.Conv3d(width, width, 3, stride=2, padding=1)
        self.far_norm = nn.GroupNorm(groups, width)
        self.logit = nn.Conv3d(width, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        x = nn.functional.layer_norm(features.movedim(1, -1), (self.features,)).movedim(-1, 1)
        x = nn.functional.silu(self.narrow(x))
        x = nn.functional.silu(self.near_norm(self.near(x)))
        x = nn.functional.silu(self.far_norm(self.far(x)))
        return self.logit(x).flatten(1).mean(dim=1)


class Heads(nn.Module):
    """One head for each block of ``spec``, on features of D channels; gives logits [B, heads]."""

    def __init__(self, features: int, spec: DiscriminatorSpec) -> None:
        super().__init__()
        self.features = features
        self.blocks = nn.ModuleDict({str(i): Head(features, spec.width) for i in spec.blocks})

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        heads = self.blocks.values()
        return torch.stack([h(x) for h, x in zip(heads, features, strict=True)], dim=1)


def build_heads(width: int, spec: DiscriminatorSpec) -> Heads:
    """Build heads for features of D = ``width`` channels, on the meta device."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return Heads(width, spec)


def block_problems(spec: DiscriminatorSpec, count: int) -> Iterator[Problem]:
    """Report blocks of ``spec`` that a model of ``count`` blocks does not have."""
    for index in spec.blocks:
        if problem := block_problem(index, count):
            way_out = "The one in the middle, at three quarters and the last are customary"
            yield Problem("blocks", f"{problem}, counted from 0. {way_out}")


def logits(role: RoleHandle, features: Mapping[int, Tensor]) -> Tensor:
    """Compute logits [B, heads] of features by block; see ``Discriminating.discriminate``."""
    if role.discriminator is None:
        raise ContractError(
            f"role {role.name!r} is no discriminator but a model; give it heads, or ask another"
        )
    blocks = role.discriminator.blocks
    if features.keys() != set(blocks):
        raise ContractError(
            f"features of blocks {sorted(features)} for the heads of role {role.name!r}, which are "
            f"on {list(blocks)}; a head learns what one block gives. Ask forward for those"
        )
    return role.modules[HEADS]([features[index] for index in blocks])


@frozen(eq=False)
class InitialHeads(WeightSource):
    """The first values of heads, in fp32: as torch draws convolutions, norms at 1 and 0.

    Each tensor is a function of seed, role and its own name.

    Attributes:
        shapes: by name.
    """

    role: str
    shapes: Mapping[str, torch.Size]
    seed: int

    @property
    def where(self) -> str:
        return f"new heads of role {self.role!r}"

    def describe(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(tuple(s), torch.float32) for name, s in self.shapes.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._draw(name) for name in names}

    def _draw(self, name: str) -> Tensor:
        layer, _, end = name.rpartition(".")
        if layer.endswith("_norm"):
            return torch.full(self.shapes[name], float(end == "weight"))
        # U(-1 / sqrt(fan in), 1 / sqrt(fan in)) for both, as nn.Conv3d.
        bound = 1 / math.sqrt(math.prod(self.shapes[f"{layer}.weight"][1:]))
        seed = derive_seed(self.seed, HEADS, self.role, HEADS, name)
        generator = torch.Generator().manual_seed(seed)
        return torch.empty(self.shapes[name]).uniform_(-bound, bound, generator=generator)


def plan_heads(width: int, role: RoleSpec) -> ModulePlan:
    """List the parameters of a discriminator on features of D = ``width`` channels."""
    assert role.heads is not None
    blocks = ", ".join(map(str, role.heads.blocks))
    return ModulePlan(
        name=HEADS,
        architecture=f"heads of width {role.heads.width} on {role.heads.on}'s blocks {blocks}",
        tensors=tuple(
            TensorPlan(
                name=name, shape=tuple(value.shape), dtype=torch.float32, trained=role.trainable
            )
            for name, value in build_heads(width, role.heads).named_parameters()
        ),
    )
