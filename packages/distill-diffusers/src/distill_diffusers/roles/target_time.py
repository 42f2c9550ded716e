"""A second time embedder, which tells a transformer the time r that a call leads to.

``e = (1 - g) e(t) + g e2(r)`` takes the place of the time embedding e(t) (AnyFlow,
arXiv:2605.13724; diffusers 0.42.1, ``models/transformers/transformer_anyflow.py``,
``AnyFlowDualTimestepTextImageEmbedding``). e2 begins as a copy of e and stands beside it in the
transformer, under the name that it has in diffusers' own class: so shards, averages, checkpoints
and exports see one module with a few more weights.

Letters: B batch, N tokens, D width of the time embedding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from attrs import frozen
from distill_protocols import RoleHandle, TensorInfo, WeightSource
from torch import Tensor, nn

from distill_diffusers.kinds import TARGET_GATE, ModelKind
from distill_diffusers.weights.sources import JoinedWeights


@frozen(eq=False)
class _Copies(WeightSource):
    """Copies of weights that another parameter has as they are: the two must share no memory."""

    source: WeightSource

    @property
    def where(self) -> str:
        return self.source.where

    def describe(self) -> Mapping[str, TensorInfo]:
        return self.source.describe()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.source.read(names).items()}


def with_target_embedder(kind: ModelKind, weights: WeightSource) -> WeightSource:
    """Return ``weights`` with those of a second time embedder: their own, or copies of those of the
    first."""
    source = _Copies(weights)
    first, second = f"{kind.time_embedder}.", f"{kind.target_embedder}."
    names = list(weights.describe())
    if any(name.startswith(second) for name in names):
        return weights
    copies = {
        second + name.removeprefix(first): (source, name)
        for name in names
        if name.startswith(first)
    }
    return JoinedWeights(weights.where, {name: (weights, name) for name in names} | copies)


def target_gate(role: RoleHandle) -> float | None:
    """Return g of a role that is a flow map; None: it is told t alone."""
    module: Any = next(iter(role.modules.values()))
    config: Mapping[str, Any] = {} if role.discriminator is not None else module.config
    return config.get(TARGET_GATE)


@contextlib.contextmanager
def mix_target_time(
    kind: ModelKind, transformer: nn.Module, target_t: Tensor, gate: float
) -> Iterator[None]:
    """Mix the embedding of ``target_t`` [B] into the time embedding of the one call that is made
    within.

    The time embedder gives [B, D], or [B, N, D] where each token has a time; r is one a clip.
    """
    features = transformer.get_submodule(kind.time_features)
    embedder = transformer.get_submodule(kind.target_embedder)

    def mix(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        target = embedder(features(target_t).to(inputs[0].dtype)).to(output.dtype)
        target = target if output.dim() == 2 else target[:, None]
        return (1 - gate) * output + gate * target

    hook = transformer.get_submodule(kind.time_embedder).register_forward_hook(mix)
    try:
        yield
    finally:
        hook.remove()
