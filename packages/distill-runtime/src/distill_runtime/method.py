"""The base class of every algorithm: stepping, mixed precision, counts and state for free."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Generic, TypedDict, TypeVar, cast

import torch
from distill_protocols import (
    CapabilityError,
    Condition,
    ContractError,
    EndTurn,
    ModelBundle,
    RandomStreams,
    RoleError,
    SamplerSpec,
    SampleView,
    StepResult,
    StopFlag,
    keep_graph,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

AdapterT = TypeVar("AdapterT")


class _MethodState(TypedDict):
    updates: Mapping[str, int]
    grad_scaler: dict[str, object]


class DistillMethod(ABC, Generic[AdapterT]):
    """Base of every algorithm: the stepping comes for free, from ``get_optimizers``.

    A subclass states ``required_roles`` and ``required_capabilities`` and writes
    ``single_train_step`` and ``get_optimizers``. Iterations count from 1.

    ``stop`` is the run's stop flag (the trainer gives each run its own). A step or a sampling that
    makes many model calls does ``self.stop.poll()`` before each, so that a preempted run need not
    wait for the rest. The trainer then takes the iteration back as if it had never begun:
    generators, loader position, persistent buffers, ``state_dict``. What a step moves beyond these
    cannot be resumed either.

    A step in which several roles step, each by a loss of its own, may compute one after the other
    and pass the losses of each but the last to ``self.end_turn``, and what that returns on: a
    trainer then differentiates them before the rest of the step begins (``EndingTurns``).

    Args:
        bundle: the roles.
        adapter: how to call them; a method that calls its modules itself passes None.
        streams: named generators; every random draw of the method comes from these.

    Raises:
        RoleError: a required role is missing, a role in ``trained_roles`` is frozen, one in
            ``frozen_roles`` is trainable, or what an optimizer moves is not what shall train.
        CapabilityError: the adapter lacks a required capability.
    """

    required_roles: tuple[str, ...] = ("student",)
    trained_roles: tuple[str, ...] = ()
    frozen_roles: tuple[str, ...] = ()
    required_capabilities: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        bundle: ModelBundle,
        adapter: AdapterT,
        *,
        streams: RandomStreams | None = None,
    ) -> None:
        self.bundle = bundle
        self.adapter = adapter
        self.streams = streams or RandomStreams(seed=0)
        self.stop = StopFlag()
        self.end_turn: EndTurn = keep_graph
        bundle.require_roles(self.required_roles)
        for name in self.trained_roles:
            if name in bundle.roles and not bundle.roles[name].trainable:
                raise RoleError(
                    f"role {name!r} is frozen, but {type(self).__name__} trains it: its loss would "
                    "reach nothing. Make the role trainable."
                )
        for name in self.frozen_roles:
            if name in bundle.roles and bundle.roles[name].trainable:
                raise RoleError(
                    f"role {name!r} is trainable, but {type(self).__name__} takes it as a fixed "
                    "target and never updates it. Freeze the role."
                )
        self.check_capabilities(self.required_capabilities)
        for role in bundle.roles.values():
            role.check_training()
        fp16 = [r.name for r in bundle.roles.values() if r.trainable and r.precision == "fp16"]
        self._grad_scaler = torch.amp.GradScaler(
            self._device().type, enabled=bool(fp16), init_scale=2.0**14
        )
        if fp16:
            self._refuse_fused_optimizers()
        self._updates: dict[str, int] = dict.fromkeys(self.optimizer_dict, 0)
        for key, optimizer in self.optimizer_dict.items():
            optimizer.register_step_post_hook(self._counter(key))

    # -- what an algorithm writes -------------------------------------------------------------

    @abstractmethod
    def single_train_step(self, batch: Any, iteration: int) -> StepResult:
        """Losses of one micro step; the trainer differentiates ``loss_map["total_loss"]``."""

    @abstractmethod
    def get_optimizers(self, iteration: int) -> dict[str, Optimizer]:
        """Return the optimizers that this iteration steps, by ``role.module``: the whole update
        schedule.

        ``self.optimizers_of("student")`` gives those of a role.
        """

    # -- optional hooks -----------------------------------------------------------------------

    def batch_ids(self, batch: Any) -> Sequence[str]:
        """Ids of the samples in ``batch``, for error messages. Default: none."""
        return ()

    @property
    def sampler_spec(self) -> SamplerSpec | None:
        """How this method's student is sampled; export writes it down. Default: unknown."""
        return None

    def sample_for_logging(
        self,
        views: Sequence[SampleView],
        cond: Condition,
        *,
        seed: int,
        rows: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Clips [B, 3, F, H, W] in [0, 1] by view name, all views from the same noise.

        Args:
            seed: of the noise. A row's noise is a function of it and of the row's place alone, so
                that a rank which samples a part gives exactly those clips of the whole.
            rows: the places of the rows of ``cond`` among all; None: 0 .. B - 1.

        Raises:
            CapabilityError: this method cannot sample (the default).
        """
        raise CapabilityError(
            f"{type(self).__name__} does not sample, so there is nothing to show in validation. "
            "Implement sample_for_logging, or leave validation out."
        )

    def autocast(self) -> AbstractContextManager[object]:
        """Context of a whole step. Default: none, as every role call enters its own precision."""
        return contextlib.nullcontext()

    # -- given --------------------------------------------------------------------------------

    def check_capabilities(self, needed: Iterable[str]) -> None:
        """Raise ``CapabilityError`` unless the adapter has every capability in ``needed``."""
        needed = tuple(needed)
        if needed:
            self.adapter.capabilities.require(needed, by=type(self).__name__)  # type: ignore[attr-defined]

    @property
    def model_dict(self) -> dict[str, nn.Module]:
        """Every module, by ``role.module``."""
        return self.bundle.by_module("modules")

    @property
    def optimizer_dict(self) -> dict[str, Optimizer]:
        """Every optimizer, by ``role.module``."""
        return self.bundle.by_module("optimizers")

    @property
    def scheduler_dict(self) -> dict[str, LRScheduler]:
        """Every learning-rate scheduler, by ``role.module``."""
        return self.bundle.by_module("schedulers")

    @property
    def grad_scaler(self) -> torch.amp.GradScaler:
        """Enabled where a trainable role computes in fp16; otherwise it passes through."""
        return self._grad_scaler

    @property
    def update_counts(self) -> dict[str, int]:
        """Optimizer steps really taken so far, by ``role.module``."""
        return dict(self._updates)

    def optimizers_of(self, *roles: str) -> dict[str, Optimizer]:
        """Return the optimizers of ``roles``, by ``role.module``."""
        self.bundle.require_roles(roles)
        return {
            f"{name}.{key}": optimizer
            for name in roles
            for key, optimizer in self.bundle.roles[name].optimizers.items()
        }

    def get_lr_schedulers(self, iteration: int) -> dict[str, LRScheduler]:
        """Return the schedulers of exactly the optimizers that this iteration steps."""
        schedulers = self.scheduler_dict
        return {key: schedulers[key] for key in self.get_optimizers(iteration) if key in schedulers}

    def unscale_gradients(self, iteration: int) -> None:
        """Make gradients true-sized before anything looks at them. No-op without fp16."""
        if self._grad_scaler.is_enabled():
            for optimizer in self.get_optimizers(iteration).values():
                self._grad_scaler.unscale_(optimizer)

    def optimizers_schedulers_step(self, iteration: int) -> tuple[str, ...]:
        """Step this iteration's optimizers, and a scheduler only where its optimizer stepped.

        An optimizer none of whose parameters got a gradient since the last step is left out: of a
        role of several experts, only those move that were called. Under fp16 the scaler leaves out
        an optimizer whose gradients overflowed. In both cases its scheduler, its update count and
        its EMA stay too, so that a schedule counts that optimizer's own steps.

        Returns:
            Keys of the optimizers that stepped.

        Raises:
            ContractError: no module of a role whose turn it is got a gradient.
        """
        stepped = []
        schedulers = self.get_lr_schedulers(iteration)
        reached = self._reached(iteration)
        self._refuse_unreached(iteration, reached)
        for key, optimizer in reached.items():
            before = self._updates[key]
            self._grad_scaler.step(optimizer)
            if self._updates[key] > before:
                stepped.append(key)
                if key in schedulers:
                    schedulers[key].step()
        if self._grad_scaler.is_enabled() and reached:
            self._grad_scaler.update()
        return tuple(stepped)

    def optimizers_zero_grad(self, iteration: int) -> None:
        """Drop the gradients of every optimizer, so that none is carried into another turn."""
        for optimizer in self.optimizer_dict.values():
            optimizer.zero_grad(set_to_none=True)

    def set_trainable(self, role: str, enabled: bool) -> None:
        """Let gradients reach a role's weights, or not."""
        self.bundle[role].set_trainable(enabled)

    def state_dict(self) -> dict[str, object]:
        """What the method itself moves: update counts and, under fp16, the scaler (JSON-able)."""
        return {"updates": dict(self._updates), "grad_scaler": self._grad_scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take back what ``state_dict`` gave."""
        saved = cast(_MethodState, state)
        self._updates.update({key: int(value) for key, value in saved["updates"].items()})
        if saved["grad_scaler"]:
            self._grad_scaler.load_state_dict(saved["grad_scaler"])

    def rank_state(self) -> Mapping[str, object]:
        """What the method moves on this process alone, of its own samples. Default: nothing.

        Tensors are not copied: whoever overrides this never writes to them again.
        """
        return {}

    def load_rank_state(self, state: Mapping[str, object]) -> None:
        """Take back what ``rank_state`` gave; of an empty state begin anew."""

    # -- inside -------------------------------------------------------------------------------

    def _reached(self, iteration: int) -> dict[str, Optimizer]:
        """Of the iteration's optimizers, those with a gradient."""
        return {
            key: optimizer
            for key, optimizer in self.get_optimizers(iteration).items()
            if any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
        }

    def _refuse_unreached(self, iteration: int, reached: Mapping[str, Optimizer]) -> None:
        turns = self.get_optimizers(iteration).keys()
        missed = [
            name
            for name in self.bundle.roles
            if (own := turns & self.optimizers_of(name).keys()) and not own & reached.keys()
        ]
        if missed:
            raise ContractError(
                f"iteration {iteration}: no gradient reached {', '.join(missed)}, whose turn it "
                "is; its optimizer would step on nothing, and it would stay as it is without a "
                "sign. "
                f"{type(self).__name__}.single_train_step must make total_loss depend on it, or "
                "get_optimizers leave it out"
            )

    def _device(self) -> torch.device:
        devices = (role.call_device for role in self.bundle.roles.values())
        return next(devices, torch.device("cpu"))

    def _counter(self, key: str) -> Any:
        def count(*_: Any) -> None:
            self._updates[key] += 1

        return count

    def _refuse_fused_optimizers(self) -> None:
        # A fused optimizer takes the scaler's verdict inside its kernel: step() runs, weights
        # stay, and nobody outside can know that the update was left out.
        fused = [
            key
            for key, optimizer in self.optimizer_dict.items()
            if any(group.get("fused") for group in optimizer.param_groups)
        ]
        if fused:
            raise ContractError(
                f"{', '.join(fused)}: a fused optimizer hides from its scheduler whether an fp16 "
                "step was left out. Use optimizers that are not fused, or bf16 or fp32."
            )
