"""An embedding of the exit step of a clip on the time embedding of a transformer.

A student that is trained at every step of its sampler makes clips of as many kinds: those of the
first step are soft, those of the last are sharp. A critic that is told which it sees learns the
score of each, and not of their mixture. The embedding is a module of the role beside its
transformers, so that their weights keep their names: checkpoints, LoRA and exports see the same
transformer with and without it.

Letters: B batch, N 1 or frames T, D width of the time embedding.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from attrs import frozen
from distill_protocols import (
    EXIT_EMBEDDING,
    ExitSpec,
    ModulePlan,
    RoleSpec,
    TensorInfo,
    TensorPlan,
    WeightsError,
    WeightSource,
)
from torch import Tensor, nn

from distill_diffusers.architecture import Architecture
from distill_diffusers.kinds import ModelKind


class ExitEmbedding(nn.Module):
    """Turn exit steps [B, N] into what is added to the time embedding, [B, N, D].

    Rows are multiplied by sqrt(D), as embeddings of words are (Vaswani et al. 2017, section 3.4):
    one step of Adam moves each number of a row by the learning rate, whereas it moves what a layer
    of D inputs gives by about sqrt(D) times that or more.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.count = count
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self, exits: Tensor) -> Tensor:
        return F.embedding(exits, self.weight) * math.sqrt(self.weight.shape[1])


def build_exit_embedding(
    kind: ModelKind, architecture: Architecture, spec: ExitSpec
) -> ExitEmbedding:
    """Build the embedding for transformers of ``architecture``, on the meta device.

    Raises:
        WeightsError: where their time embedding is is not known.
    """
    layers = [
        size
        for name, size in architecture.linear_layers.items()
        if name.startswith(f"{kind.time_embedder}.")
    ]
    if not kind.time_embedder or not layers:
        raise WeightsError(
            f"{architecture.class_name} cannot be told exit steps: where its time embedding is, is "
            "not stated (ModelKind.time_embedder). Use a family that states it, or leave exits out"
        )
    with torch.device("meta"):
        return ExitEmbedding(spec.count, layers[-1][1])


@contextlib.contextmanager
def add_to_time_embedding(
    transformer: nn.Module, time_embedder: str, embedding: Tensor
) -> Iterator[None]:
    """Add ``embedding`` [B, N, D] to the time embedding of the one call that is made within.

    The time embedder gives [B, D], or [B, tokens, D] where each token has a time: N is 1, or the
    number of frames, whose tokens lie one after another. It is within no block, so nothing of it is
    computed again where blocks are checkpointed.
    """

    def add(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        added = embedding.to(output.dtype)
        if output.dim() == 2:
            return output + added.squeeze(1)
        tokens = output.shape[1] // added.shape[1]
        return output + (added if added.shape[1] == 1 else added.repeat_interleave(tokens, dim=1))

    hook = transformer.get_submodule(time_embedder).register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


@frozen(eq=False)
class InitialExits(WeightSource):
    """The first values of an embedding: zero, so that a role begins as one without it."""

    role: str
    shapes: Mapping[str, torch.Size]

    @property
    def where(self) -> str:
        return f"new embedding of exit steps of role {self.role!r}"

    def describe(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(tuple(s), torch.float32) for name, s in self.shapes.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: torch.zeros(self.shapes[name]) for name in names}


def plan_exit_embedding(kind: ModelKind, architecture: Architecture, role: RoleSpec) -> ModulePlan:
    """List the parameters of the embedding of ``role``, as ``RoleLoader`` makes it."""
    assert role.exits is not None
    module = build_exit_embedding(kind, architecture, role.exits)
    return ModulePlan(
        name=EXIT_EMBEDDING,
        architecture=f"{role.exits.count} exit steps of width {module.weight.shape[1]}",
        tensors=tuple(
            TensorPlan(
                name=key, shape=tuple(value.shape), dtype=torch.float32, trained=role.trainable
            )
            for key, value in module.named_parameters()
        ),
    )
