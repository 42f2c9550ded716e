"""Roles as they will be: sizes and types, without weights."""

from __future__ import annotations

import math

import torch
from attrs import frozen


@frozen(kw_only=True)
class TensorPlan:
    """One parameter as a role will hold it.

    Attributes:
        block: dotted name of the repeated block that it belongs to: what is gathered at once
            where the role is sharded. None: of no block.
        trained: whether training moves it.
        adapter: whether LoRA added it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    block: str | None = None
    trained: bool = False
    adapter: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@frozen(kw_only=True)
class ModulePlan:
    """One module as it will be, from the meta device: no weights.

    Attributes:
        tensors: its parameters, in the module's order.
        buffers, buffer_bytes: elements and bytes of its buffers.
    """

    name: str
    architecture: str
    tensors: tuple[TensorPlan, ...]
    buffers: int = 0
    buffer_bytes: int = 0

    @property
    def parameters(self) -> int:
        """How many, without adapters."""
        return sum(tensor.numel for tensor in self.tensors if not tensor.adapter)

    @property
    def adapters(self) -> int:
        """Parameters that LoRA adds to them; they alone train then."""
        return sum(tensor.numel for tensor in self.tensors if tensor.adapter)


@frozen(kw_only=True)
class RolePlan:
    """One role as it will be."""

    role: str
    source: str
    modules: tuple[ModulePlan, ...]
    present: bool
    """Whether the weights are there to be read now."""

    @property
    def parameters(self) -> int:
        """Over all modules, without adapters."""
        return sum(module.parameters for module in self.modules)

    @property
    def adapters(self) -> int:
        """Over all modules."""
        return sum(module.adapters for module in self.modules)


@frozen(kw_only=True)
class CallPlan:
    """Bytes of one forward call of a role (with its backward pass, where it learns), beside its
    weights and their gradients.

    Attributes:
        held: between forward and backward; 0 of a role that does not learn.
        most: at once, at any moment.
    """

    held: int
    most: int
