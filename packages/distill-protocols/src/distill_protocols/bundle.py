"""Roles and their training state. All roles are equal: any string is a name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from attrs import define, field, frozen
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distill_protocols.errors import RoleError

Precision = Literal["fp32", "bf16", "fp16"]

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class WeightAverage(Protocol):
    """An average of one module's weights (see ``distill_trainer.ema``)."""

    @property
    def updates(self) -> int: ...
    def update(self, module: nn.Module) -> None: ...
    def swapped_in(self, module: nn.Module) -> AbstractContextManager[None]:
        """Within: ``module`` holds the average; after: its own weights again."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@define(eq=False, kw_only=True)
class RoleHandle:
    """One role: its modules and what training hangs on them.

    Attributes:
        name: any string; ``student``, ``teacher``, ``critic`` ... by custom.
        modules: ``{"transformer": ...}``; two experts are two modules.
        trainable: a frozen role has no optimizer and takes no gradient, ever.
        precision: compute precision of a call. A trainable role keeps fp32 weights under it.
        fsdp_policy: how to shard it; the trainer's distribution reads it.
        ema, optimizers, schedulers: keyed by module name.
    """

    name: str
    modules: dict[str, nn.Module]
    trainable: bool = False
    precision: Precision = "fp32"
    fsdp_policy: Mapping[str, Any] | None = None
    ema: dict[str, WeightAverage] = field(factory=dict)
    optimizers: dict[str, Optimizer] = field(factory=dict)
    schedulers: dict[str, LRScheduler] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        self.set_trainable(self.trainable)

    def set_trainable(self, enabled: bool) -> None:
        """Let gradients reach this role's weights, or not; frozen also means eval mode.

        Raises:
            RoleError: gradients asked for a role that is frozen by the run's configuration.
        """
        if enabled and not self.trainable:
            raise RoleError(
                f"role {self.name!r} is frozen (trainable: false), so it has no optimizer and "
                "must never get a gradient. Set models.<role>.trainable: true if it shall learn."
            )
        for module in self.modules.values():
            module.requires_grad_(enabled)
            module.train(enabled)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of one forward call in this role's precision."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        device = next(p.device for m in self.modules.values() for p in m.parameters())
        return torch.autocast(device.type, dtype=DTYPES[self.precision])

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Within: eval mode and no gradient to its weights; after: each part as it was."""
        modes = [(p, p.training) for module in self.modules.values() for p in module.modules()]
        learns = [(p, p.requires_grad) for m in self.modules.values() for p in m.parameters()]
        self.set_trainable(False)
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training
            for parameter, requires_grad in learns:
                parameter.requires_grad_(requires_grad)

    @contextlib.contextmanager
    def averaged(self, *, ema: bool = True) -> Iterator[None]:
        """Within: modules hold their EMA weights. ``ema=False`` changes nothing.

        Raises:
            RoleError: EMA asked for, but this role keeps none.
        """
        with contextlib.ExitStack() as stack:
            if ema:
                missing = sorted(set(self.modules) - set(self.ema))
                if missing:
                    raise RoleError(
                        f"role {self.name!r} keeps no EMA of {', '.join(missing)}; EMA weights "
                        "exist only where the ema callback lists the role. Add it under "
                        "callbacks.ema.roles, or ask for the live weights."
                    )
                for key, module in self.modules.items():
                    stack.enter_context(self.ema[key].swapped_in(module))
            yield


@define(eq=False)
class ModelBundle:
    """All roles of a run, by name."""

    roles: dict[str, RoleHandle]

    def require_roles(self, names: Iterable[str]) -> None:
        """Raise ``RoleError`` saying which of ``names`` are missing and which roles exist."""
        missing = [name for name in names if name not in self.roles]
        if missing:
            raise RoleError(
                f"missing role(s): {', '.join(missing)}; this run has: "
                f"{', '.join(self.roles) or 'none'}. The method calls each of them by name. "
                "Add the role(s) under `models:`."
            )

    def __getitem__(self, name: str) -> RoleHandle:
        self.require_roles([name])
        return self.roles[name]

    def by_module(
        self, kind: Literal["modules", "optimizers", "schedulers", "ema"]
    ) -> dict[str, Any]:
        """``{"student.transformer": ...}`` of one kind over all roles, in role order."""
        table = {
            "modules": lambda role: role.modules,
            "optimizers": lambda role: role.optimizers,
            "schedulers": lambda role: role.schedulers,
            "ema": lambda role: role.ema,
        }
        return {
            f"{name}.{key}": value
            for name, role in self.roles.items()
            for key, value in table[kind](role).items()
        }


@frozen(kw_only=True)
class ModulePlan:
    """One module as it will be, from the meta device: counts only, no weights."""

    name: str
    architecture: str
    parameters: int
    buffers: int = 0


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
        """Over all modules."""
        return sum(module.parameters for module in self.modules)
