"""Weights that wait in host memory while other roles are called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from attrs import define, frozen
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from distill_protocols import RoleHandle
from torch import Tensor, nn


def take_turns(roles: Iterable[RoleHandle], device: torch.device) -> None:
    """Let the roles with ``offload``, which are frozen, be on ``device`` by turns, one at a time.

    One comes when it is called, and goes when any other role is called or the backward pass of
    one begins: between guidance's two calls, or a sampler's many, it stays. Its weights never
    change, so what comes is a copy and what goes is dropped: nothing is moved back. To a GPU the
    copies are made from pinned memory.

    A call under gradients needs no care. What comes are new parameters, not new data for the old
    ones, and the graph holds those that its backward pass needs: they live just until then.
    (accelerate's hook exchanges the data under the graph, and copies back; diffusers' group
    offloading lets go of a block after its forward pass.)

    On the CPU the same copies are made and dropped, of no use but to try it.
    """
    roles = list(roles)
    if not any(role.offload for role in roles):
        return
    turns = _Turns()
    for role in roles:
        for module in role.modules.values():
            if role.offload:
                turns.begin_with(module, _Waiting.of(module, device))
            else:
                turns.end_with(module)


@frozen(eq=False)
class _Waiting:
    """A module's weights at home."""

    device: torch.device
    weights: tuple[tuple[nn.Module, str, nn.Parameter], ...]
    """(owner, name in it, parameter on the CPU)."""

    @classmethod
    def of(cls, module: nn.Module, device: torch.device) -> _Waiting:
        weights = tuple(
            (owner, name, _pinned(parameter) if device.type == "cuda" else parameter)
            for owner in module.modules()
            for name, parameter in owner.named_parameters(recurse=False)
        )
        return cls(device, weights)

    def come(self) -> None:
        for owner, name, parameter in self.weights:
            copy = parameter.detach().to(self.device, non_blocking=True, copy=True)
            setattr(owner, name, nn.Parameter(copy, requires_grad=False))

    def go(self) -> None:
        for owner, name, parameter in self.weights:
            setattr(owner, name, parameter)


@define(eq=False)
class _Turns:
    """Whose turn it is."""

    _on: _Waiting | None = None

    def begin_with(self, module: nn.Module, waiting: _Waiting) -> None:
        """Its calls bring ``waiting``."""
        module.register_forward_pre_hook(self._turn_to(waiting))
        if isinstance(module, WanTransformer3DModel) and module.is_gradient_checkpointing:
            # The backward pass calls blocks again, and not through the module.
            for block in module.blocks:
                block.register_forward_pre_hook(self._turn_to(waiting))

    def end_with(self, module: nn.Module) -> None:
        """Its calls, and their backward passes, send home whoever is on."""
        module.register_forward_pre_hook(self._turn_to(None))
        module.register_forward_hook(self._watch)

    def _turn_to(self, waiting: _Waiting | None) -> Any:
        @torch.compiler.disable
        def turn(*_: Any) -> None:
            if self._on is not waiting:
                self._end()
                if waiting is not None:
                    waiting.come()
                self._on = waiting

        return turn

    def _watch(self, module: nn.Module, args: Any, output: Any) -> None:
        for value in output if isinstance(output, tuple) else output.to_tuple():
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(lambda gradient: self._end())

    def _end(self) -> None:
        if self._on is not None:
            self._on.go()
            self._on = None


def _pinned(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().pin_memory(), requires_grad=False)
