"""One optimizer and one learning-rate schedule per module of a role."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from distill_protocols import ContractError, RoleError, RoleHandle
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distill_trainer.config import OptimizerConfig, ScheduleConfig

_FUSED_DEVICES = ("cpu", "cuda")


def schedule_factor(config: ScheduleConfig, done: int, horizon: int) -> float:
    """Share of the full rate for the step that follows ``done`` steps.

    Warm-up rises as (done + 1) / (warmup_steps + 1); after it, with p the share of the remaining
    ``horizon`` that is done, linear falls as 1 - p and cosine as (1 + cos(pi p)) / 2
    (SGDR, Loshchilov and Hutter 2017, eq. 5), both scaled to end at ``final_ratio``.

    Args:
        horizon: steps that this optimizer will take in the whole run.
    """
    if done < config.warmup_steps:
        return (done + 1) / (config.warmup_steps + 1)
    if config.name == "constant":
        return 1.0
    p = min(1.0, (done - config.warmup_steps) / max(1, horizon - config.warmup_steps))
    fall = 1 - p if config.name == "linear" else (1 + math.cos(math.pi * p)) / 2
    return config.final_ratio + (1 - config.final_ratio) * fall


Horizon = int | Mapping[str, int]
"""Steps of a role's optimizers, by module where they differ."""


class OptimizerSchedule(LambdaLR):
    """The learning rate of one optimizer: ``schedule_factor`` of the steps that it has taken.

    Settings are those that it was made with, also after ``load_state_dict``, which takes over how
    many steps were taken and where they began. So a run that goes on with another rate or another
    schedule has that, and one with the same settings has the same rate, bit for bit.

    Args:
        optimizer: what it drives.
        config: its settings.
        horizon: gives the steps that the optimizer takes in the run's iterations after a given one.

    Attributes:
        started_after: iteration of the run after which the optimizer began; 0: with the run.
    """

    _OWN = ("started_after", "_config", "_horizon", "_steps")

    def __init__(
        self, optimizer: Optimizer, config: ScheduleConfig, horizon: Callable[[int], int]
    ) -> None:
        self.started_after = 0
        self._config = config
        self._horizon = horizon
        self._steps = horizon(0)
        super().__init__(optimizer, lambda done: schedule_factor(self._config, done, self._steps))

    def start_after(self, iteration: int) -> None:
        """Count the horizon from ``iteration`` on: see ``RestartableSchedule``."""
        if iteration != self.started_after:
            self.started_after, self._steps = iteration, self._horizon(iteration)
        self._set_rates()

    def state_dict(self) -> dict[str, object]:
        """Return the count of steps, and where it began if that is not the run's beginning."""
        state: dict[str, object] = {
            name: v for name, v in super().state_dict().items() if name not in self._OWN
        }
        return state | ({"started_after": self.started_after} if self.started_after else {})

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Go on with the count of ``state_dict`` and the rates of this schedule's own settings."""
        settings = {"base_lrs": self.base_lrs, "lr_lambdas": [None] * len(self.base_lrs)}
        counts = {name: value for name, value in state_dict.items() if name != "started_after"}
        super().load_state_dict(counts | settings)
        self.start_after(cast(int, state_dict.get("started_after", 0)))

    def _set_rates(self) -> None:
        # As LambdaLR.get_lr computes them, so that a resumed run has the bits of one that went on.
        rates = [
            base * factor(self.last_epoch)
            for base, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)
        ]
        groups = self.optimizer.param_groups
        for group, base, rate in zip(groups, self.base_lrs, rates, strict=True):
            group["initial_lr"], group["lr"] = base, rate
        self._last_lr = rates


def build_optimizers(
    role: RoleHandle,
    config: OptimizerConfig,
    *,
    horizon: Horizon | Callable[[int], Horizon],
    scaled: bool = False,
) -> None:
    """Give ``role`` one optimizer and one scheduler for each of its modules.

    Args:
        horizon: steps that these optimizers will take in the whole run (not iterations: a
            student that is updated every fifth iteration has a fifth of them). By module where
            they differ: each of two experts takes a share of the role's steps. A function gives
            those after an iteration of the run, so that the schedule of a role which a resumed run
            adds, or whose optimizer it restarts, ends at the run's end.
        scaled: whether a trainable role of the run, this or another, computes in fp16: loss
            scaling then goes for all of them.

    Raises:
        RoleError: the role is frozen, or a module of it has nothing to train.
        ContractError: ``fused`` was asked for under fp16.
    """
    if not role.trainable:
        raise RoleError(
            f"role {role.name!r} is frozen (trainable=False), so it must have no optimizer. Make "
            "it trainable if its weights shall move."
        )
    scaled = scaled or role.precision == "fp16"
    if scaled and config.fused:
        raise ContractError(
            f"role {role.name!r}: a fused optimizer where a trainable role of the run has "
            "precision fp16; a fused step hides whether loss scaling left it out. Leave "
            "OptimizerConfig.fused out, or use bf16 or fp32 for every trainable role."
        )
    for key in role.modules:
        optimizer = _build_optimizer(role, key, config, scaled)
        role.optimizers[key] = optimizer
        role.schedulers[key] = OptimizerSchedule(
            optimizer, config.schedule, _steps_after(horizon, key)
        )


def _steps_after(horizon: Horizon | Callable[[int], Horizon], module: str) -> Callable[[int], int]:
    def steps_after(iteration: int) -> int:
        steps = horizon(iteration) if callable(horizon) else horizon
        return steps if isinstance(steps, int) else steps[module]

    return steps_after


def _build_optimizer(
    role: RoleHandle, key: str, config: OptimizerConfig, scaled: bool
) -> Optimizer:
    parameters = list(role.trained_parameters(key).values())
    if not parameters:
        raise RoleError(
            f"{role.name}.{key} has no parameter that takes a gradient, but the role is "
            "trainable; an optimizer needs something to move. Freeze the role, or give it weights "
            "that train."
        )
    fused = not scaled and _use_fused(parameters, config.fused)
    if config.name == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused
        )
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=fused,
    )


def _use_fused(parameters: Sequence[nn.Parameter], wanted: bool | None) -> bool:
    if wanted is not None:
        return wanted
    # Measured on CPU: fused AdamW is five times as fast as the loop that is torch's default there.
    return all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters)
