"""One optimizer and one learning-rate schedule per module of a role."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

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


def build_optimizers(
    role: RoleHandle,
    config: OptimizerConfig,
    *,
    horizon: int | Mapping[str, int],
    scaled: bool = False,
) -> None:
    """Give ``role`` one optimizer and one scheduler for each of its modules.

    Args:
        horizon: steps that these optimizers will take in the whole run (not iterations: a
            student that is updated every fifth iteration has a fifth of them). By module where
            they differ: each of two experts takes a share of the role's steps.
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
        steps = horizon if isinstance(horizon, int) else horizon[key]
        role.schedulers[key] = LambdaLR(optimizer, _schedule(config.schedule, steps))


def _schedule(config: ScheduleConfig, horizon: int) -> Callable[[int], float]:
    # A closure, not an object: LambdaLR writes an object's fields into checkpoints, and a run
    # that is resumed with a longer horizon would get the old one back.
    return lambda done: schedule_factor(config, done, horizon)


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
