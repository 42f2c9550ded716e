"""Weights that wait in host memory while other roles are called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from attrs import define, frozen
from diffusers.models.modeling_utils import ModelMixin
from distill_protocols import RoleHandle
from torch import Tensor, nn


def offload_between_calls(roles: Iterable[RoleHandle], device: torch.device) -> None:
    """Keep on ``device`` only one of the roles with ``offload`` at a time; they are frozen.

    A role is loaded when it is called, and unloaded when any other role is called or the backward
    pass of another begins: between guidance's two calls, or a sampler's many, it stays. Its weights
    never change, so a copy is loaded and dropped again: nothing is moved back. To a GPU the copies
    are made from pinned memory.

    A call under gradients needs no care. What is loaded are new parameters, not new data for the
    old ones, and the graph keeps those that its backward pass needs: they live just until then.
    (accelerate's hook exchanges the data under the graph, and copies back; diffusers' group
    offloading drops a block after its forward pass.)

    On the CPU the same copies are made and dropped, which is of no use but to test it.
    """
    roles = list(roles)
    if not any(role.offload for role in roles):
        return
    switch = _Switch()
    for role in roles:
        for key, module in role.modules.items():
            if role.offload:
                blocks = [module.get_submodule(name) for name in role.blocks.get(key, ())]
                switch.load_for(module, blocks, _HostWeights.of(module, device))
            else:
                switch.unload_for(module)


@frozen(eq=False)
class _HostWeights:
    """The weights of a module in host memory."""

    device: torch.device
    weights: tuple[tuple[nn.Module, str, nn.Parameter], ...]
    """(owner, name in it, parameter on the CPU)."""

    @classmethod
    def of(cls, module: nn.Module, device: torch.device) -> _HostWeights:
        weights = tuple(
            (owner, name, _pin(parameter) if device.type == "cuda" else parameter)
            for owner in module.modules()
            for name, parameter in owner.named_parameters(recurse=False)
        )
        return cls(device, weights)

    def load(self) -> None:
        """Put copies on the device into the module."""
        for owner, name, parameter in self.weights:
            copy = parameter.detach().to(self.device, non_blocking=True, copy=True)
            setattr(owner, name, nn.Parameter(copy, requires_grad=False))

    def unload(self) -> None:
        """Put the parameters in host memory back; the copies are freed."""
        for owner, name, parameter in self.weights:
            setattr(owner, name, parameter)


@define(eq=False)
class _Switch:
    """Loads the weights of whichever module is called, and unloads those of the one before."""

    _loaded: _HostWeights | None = None

    def load_for(
        self, module: nn.Module, blocks: Iterable[nn.Module], weights: _HostWeights
    ) -> None:
        """Load ``weights`` when ``module`` is called."""
        module.register_forward_pre_hook(self._switch_to(weights))
        if isinstance(module, ModelMixin) and module.is_gradient_checkpointing:
            # The backward pass calls blocks again, and not through the module.
            for block in blocks:
                block.register_forward_pre_hook(self._switch_to(weights))

    def unload_for(self, module: nn.Module) -> None:
        """Unload what is loaded when ``module`` is called, or its backward pass begins."""
        module.register_forward_pre_hook(self._switch_to(None))
        module.register_forward_hook(self._unload_in_backward)

    def _switch_to(self, weights: _HostWeights | None) -> Any:
        @torch.compiler.disable
        def switch(*_: Any) -> None:
            if self._loaded is not weights:
                self._unload()
                if weights is not None:
                    weights.load()
                self._loaded = weights

        return switch

    def _unload_in_backward(self, module: nn.Module, args: Any, output: Any) -> None:
        for value in output if isinstance(output, tuple) else output.to_tuple():
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(lambda gradient: self._unload())

    def _unload(self) -> None:
        if self._loaded is not None:
            self._loaded.unload()
            self._loaded = None


def _pin(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().pin_memory(), requires_grad=False)
