"""Roles and their training state. All roles are equal: any string is a name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Literal, Protocol, overload, runtime_checkable

import torch
from attrs import define, field
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distill_protocols.errors import RoleError
from distill_protocols.roles import EXIT_EMBEDDING, DiscriminatorSpec, FsdpPolicy, Precision
from distill_protocols.weights import TensorWeights

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class WeightAverage(Protocol):
    """An average of one module's weights (``distill_trainer`` has one)."""

    @property
    def updates(self) -> int: ...
    def update(self, module: nn.Module) -> None: ...
    def swapped_in(self, module: nn.Module) -> AbstractContextManager[None]:
        """Within: ``module`` holds the average; after: its own weights again."""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """What is averaged, under the names of ``RoleHandle.moving_state``; not copies."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """``weights()`` and whatever else a resumed average needs; not copies."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


@runtime_checkable
class RestartableSchedule(Protocol):
    """A learning-rate schedule that is a function of the run's settings and of its own steps.

    Of a state that it loads it takes how many steps were taken, and no rate: a run that goes on
    with other settings has those. (``distill_trainer`` has one.)
    """

    def start_after(self, iteration: int) -> None:
        """Let the schedule begin after ``iteration`` of the run, whose steps before it are none of
        this optimizer's: one that a resumed run adds or restarts ends at the run's end too."""
        ...


@define(eq=False, kw_only=True)
class RoleHandle:
    """One role: its modules and what training hangs on them.

    Attributes:
        name: any string; ``student``, ``teacher``, ``critic`` ... by custom.
        modules: ``{"transformer": ...}``; two experts are two modules. Last, where the role is told
            exit steps, their embedding (``EXIT_EMBEDDING``).
        trainable: a frozen role has no optimizer and takes no gradient, ever.
        precision: compute precision of a call. A trainable role keeps fp32 weights under it.
        fsdp_policy: how it is spread over processes; the trainer's distribution reads it.
        call_options: what the family's adapter must know to call the modules and no module states
            (which of two experts when ...); nobody else reads it.
        blocks: by module, the dotted names of its repeated blocks: what is sharded one at a time
            where the policy names nothing else.
        offload: weights wait in host memory while other roles are called.
        discriminator: which features it reads, of a role that is a discriminator; None: the role
            is a model.
        trained: by module, the names of the only parameters that ever move (LoRA: the adapter's);
            None: all of them. The others are what the role's source states, and are not saved.
        device: where calls compute; None: where the weights are.
        release_gathered: frees whole weights that were gathered from several processes for a
            call. It comes before anything reads or changes a parameter from outside of a call,
            which would find the gathered copy in its place.
        ema, optimizers, schedulers: keyed by module name.
    """

    name: str
    modules: dict[str, nn.Module]
    trainable: bool = False
    precision: Precision = "fp32"
    fsdp_policy: FsdpPolicy | None = None
    call_options: Mapping[str, object] = field(factory=dict)
    blocks: Mapping[str, tuple[str, ...]] = field(factory=dict)
    offload: bool = False
    discriminator: DiscriminatorSpec | None = None
    trained: Mapping[str, frozenset[str]] | None = None
    device: torch.device | None = None
    release_gathered: Callable[[], None] = lambda: None
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
                f"role {self.name!r} is frozen (trainable=False), so it has no optimizer and "
                "must never get a gradient. Make it trainable if its weights shall move."
            )
        self.release_gathered()
        for key, module in self.modules.items():
            if self.trained is None:
                module.requires_grad_(enabled)
            else:
                for name, parameter in module.named_parameters():
                    parameter.requires_grad_(enabled and name in self.trained[key])
            module.train(enabled)

    @property
    def transformers(self) -> dict[str, nn.Module]:
        """The modules that a call goes to: all but the embedding of exit steps."""
        return {name: m for name, m in self.modules.items() if name != EXIT_EMBEDDING}

    def trained_parameters(self, module: str) -> dict[str, nn.Parameter]:
        """Return the parameters of ``module`` that training moves, by name; none of a frozen
        role."""
        if not self.trainable:
            return {}
        self.release_gathered()
        parameters = dict(self.modules[module].named_parameters())
        if self.trained is None:
            return parameters
        return {name: p for name, p in parameters.items() if name in self.trained[module]}

    def moving_state(self, module: str) -> dict[str, Tensor]:
        """What training changes in ``module``, under the names of its ``state_dict``.

        Trained parameters, and persistent buffers. The tensors are the module's own, not copies;
        parameters stay parameters (tied ones under each of their names).
        """
        self.release_gathered()
        state = self.modules[module].state_dict(keep_vars=True)
        if self.trained is None:
            return state
        names = self.trained[module]
        return {
            name: value
            for name, value in state.items()
            if name in names or not isinstance(value, nn.Parameter)
        }

    def weight_sources(self, *, ema: bool = False) -> dict[str, TensorWeights]:
        """What training made of each module, to export or to start another role from.

        Raises:
            RoleError: EMA asked for, but this role keeps none.
        """
        if ema:
            self._require_ema()
        return {
            key: TensorWeights(
                f"role {self.name!r}, {key}{' (EMA)' if ema else ''}",
                self.ema[key].weights() if ema else self.moving_state(key),
            )
            for key in self.modules
        }

    def check_training(self) -> None:
        """What has a gradient, what an optimizer moves and what is meant to train are one set.

        Raises:
            RoleError: they differ, with the names: a weight would silently stay as it is, or move
                without being saved.
        """
        for key, module in self.modules.items():
            self.release_gathered()
            meant = set(self.trained_parameters(key))
            names = {p: name for name, p in module.named_parameters()}
            takes = {name for p, name in names.items() if p.requires_grad}
            sets = {"takes a gradient": takes}
            if key in self.optimizers:
                groups = self.optimizers[key].param_groups
                sets["is in its optimizer"] = {
                    names.get(p, "a parameter of another module")
                    for g in groups
                    for p in g["params"]
                }
            for what, found in sets.items():
                if found != meant:
                    raise RoleError(
                        f"role {self.name!r}, module {key!r}: {_some(meant - found)} shall train "
                        f"and {_some(found - meant)} shall not, but it is the other way round for "
                        f"what {what}. One set must train, take gradients and be saved, or weights "
                        "stay behind without a sign. Say which train in RoleHandle.trained, and "
                        "make the optimizer from RoleHandle.trained_parameters."
                    )

    @property
    def call_device(self) -> torch.device:
        """Where calls compute: not where the weights of a role are that is offloaded."""
        weights = (p.device for m in self.modules.values() for p in m.parameters())
        return self.device or next(weights, torch.device("cpu"))

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context of one forward call in this role's precision."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.call_device.type, dtype=DTYPES[self.precision])

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Within: eval mode and no gradient to its weights; after: each part as it was."""
        self.release_gathered()
        modes = [(p, p.training) for module in self.modules.values() for p in module.modules()]
        flags = [(p, p.requires_grad) for m in self.modules.values() for p in m.parameters()]
        self.set_trainable(False)
        try:
            yield
        finally:
            self.release_gathered()
            for part, training in modes:
                part.training = training
            for parameter, requires_grad in flags:
                parameter.requires_grad_(requires_grad)

    @contextlib.contextmanager
    def averaged(self, *, ema: bool = True) -> Iterator[None]:
        """Within: modules hold their EMA weights. ``ema=False`` changes nothing.

        Raises:
            RoleError: EMA asked for, but this role keeps none.
        """
        with contextlib.ExitStack() as stack:
            if ema:
                self._require_ema()
                for key, module in self.modules.items():
                    stack.enter_context(self.ema[key].swapped_in(module))
            yield

    def _require_ema(self) -> None:
        missing = sorted(set(self.modules) - set(self.ema))
        if missing:
            raise RoleError(
                f"role {self.name!r} keeps no EMA of {', '.join(missing)}; EMA weights exist only "
                "where the run averages the role. Let the ema callback average it, or ask for the "
                "live weights."
            )


def _some(names: set[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(sorted(names)[:most]) or "nothing") + more


@define(eq=False)
class ModelBundle:
    """All roles of a run, by name.

    Attributes:
        device: where VAE and encoders run if there are no roles, as when data are made; None: the
            CPU. With roles they run beside them.
    """

    roles: dict[str, RoleHandle]
    device: torch.device | None = None

    def require_roles(
        self, names: Iterable[str], *, why: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Raise ``RoleError`` saying which of ``names`` are missing and which roles exist.

        Args:
            why: by role, why it is needed (``RoleNeed.reason``).
        """
        missing = [name for name in names if name not in self.roles]
        if missing:
            raise RoleError(
                f"missing role(s): {', '.join(missing)}; this run has: "
                f"{', '.join(self.roles) or 'none'}. The method calls each of them by name. "
                "Give the run the role(s)."
                + "".join(f" {name}: {why[name]}." for name in missing if why.get(name))
            )

    def __getitem__(self, name: str) -> RoleHandle:
        self.require_roles([name])
        return self.roles[name]

    @overload
    def by_module(self, kind: Literal["modules"]) -> dict[str, nn.Module]: ...
    @overload
    def by_module(self, kind: Literal["optimizers"]) -> dict[str, Optimizer]: ...
    @overload
    def by_module(self, kind: Literal["schedulers"]) -> dict[str, LRScheduler]: ...
    @overload
    def by_module(self, kind: Literal["ema"]) -> dict[str, WeightAverage]: ...
    def by_module(self, kind: str) -> Mapping[str, object]:
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
