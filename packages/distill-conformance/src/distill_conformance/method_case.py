"""What the suite of methods needs to know about one method, and how it builds and steps it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from attrs import Factory, define, evolve, field, frozen
from distill_protocols import (
    Batch,
    ConditioningProvider,
    DistillAdapter,
    MethodConfig,
    MethodPlugin,
    ModelBundle,
    RandomStreams,
    StepResult,
    TrainableMethod,
    map_latents,
)
from torch import Tensor

from distill_conformance.toy import ToyConditioning, toy_batch, toy_models

Models = tuple[DistillAdapter, ModelBundle]


def _toy_models(case: MethodCase) -> Callable[[int], Models]:
    return lambda seed: toy_models(
        case.config.roles, seed=seed, causal_roles=case.causal_roles, sound=case.sound
    )


def _toy_batches(case: MethodCase) -> Callable[[int, int], Batch]:
    levels = len(case.config.trajectory_times)
    return lambda size, seed: toy_batch(size, seed, levels=levels, sound=case.sound)


@define(eq=False, kw_only=True)
class MethodCase:
    """One method with one set of options.

    Attributes:
        plugin: the method, as its entry point names it.
        config: its options.
        causal_roles: roles of the toy models that are causal.
        sound: whether the toy models' clips are two named tensors.
        accumulation_config: options with which nothing is drawn once a micro batch (such as the
            step at which a rollout ends), for comparing cuts of one batch; left out, ``config``.
        models: seed -> adapter and bundle, with optimizers and schedulers of the trained roles,
            the same for the same seed; left out, toy models.
        batch: (size, seed) -> a batch whose row n does not depend on the size; left out, toy
            latents and texts.
        conditioning: gives the negative condition; left out, one of the toy models' shape.
        losses: how many losses a trained role has in one iteration, each at a t of its own, so
            that an iteration may reach as many experts of it.
        iterations: that the checks step through: enough that each trained role has several.
        rtol: how far gradients of a batch and of its parts may differ, relative to their norm.
    """

    plugin: MethodPlugin[Any]
    config: MethodConfig
    causal_roles: Sequence[str] = ()
    sound: bool = False
    accumulation_config: MethodConfig = Factory(lambda case: case.config, takes_self=True)
    models: Callable[[int], Models] = Factory(_toy_models, takes_self=True)
    batch: Callable[[int, int], Batch] = Factory(_toy_batches, takes_self=True)
    conditioning: ConditioningProvider = field(factory=ToyConditioning)
    losses: int = 1
    iterations: int = 20
    rtol: float = 1e-3

    def build(
        self,
        *,
        config: MethodConfig | None = None,
        streams: RandomStreams | None = None,
        models: Models | None = None,
        conditioning: ConditioningProvider | None = None,
        seed: int = 0,
    ) -> TrainableMethod:
        """Return the method on fresh models, or on ``models``."""
        adapter, bundle = self.models(seed) if models is None else models
        return self.plugin.build(
            self.config if config is None else config,
            bundle=bundle,
            adapter=adapter,
            conditioning=self.conditioning if conditioning is None else conditioning,
            streams=RandomStreams(seed) if streams is None else streams,
        )

    @property
    def trained_roles(self) -> frozenset[str]:
        """Names of the roles that the config trains."""
        return frozenset(need.name for need in self.config.roles if need.trainable)


@frozen(eq=False)
class Iteration:
    """What one iteration did.

    Attributes:
        losses: of the last micro step, detached.
        outputs: of the last micro step.
        gradients: by ``role.module``, of each module that got one, as one vector.
        stepped: keys of the optimizers that stepped.
    """

    losses: dict[str, Tensor]
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    stepped: tuple[str, ...]


def run_iteration(method: TrainableMethod, batches: Sequence[Batch], iteration: int) -> Iteration:
    """Accumulate over ``batches``, step and drop the gradients, as the trainer does."""
    result = accumulate(method, batches, iteration)
    found = gradients(method)
    method.unscale_gradients(iteration)
    stepped = method.optimizers_schedulers_step(iteration)
    method.optimizers_zero_grad(iteration)
    losses = {name: loss.detach() for name, loss in result.loss_map.items()}
    return Iteration(losses, result.outputs, found, stepped)


def accumulate(method: TrainableMethod, batches: Sequence[Batch], iteration: int) -> StepResult:
    """Forward and backward of each micro batch; the last result, with the mean of all losses."""
    results = []
    for batch in batches:
        with method.autocast():
            result = method.single_train_step(batch, iteration)
        method.grad_scaler.scale(result.loss_map["total_loss"] / len(batches)).backward()
        results.append(result)
    losses = {
        name: torch.stack([r.loss_map[name].detach() for r in results]).mean()
        for name in results[-1].loss_map
    }
    return StepResult(losses, results[-1].outputs)


def gradients(method: TrainableMethod) -> dict[str, Tensor]:
    """By ``role.module``: of each module that got one, all gradients as one vector."""
    found = {}
    for key, module in method.model_dict.items():
        parts = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        if parts:
            found[key] = torch.cat(parts).clone()
    return found


def weights(method: TrainableMethod) -> dict[str, Tensor]:
    """By ``role.module.name``: copies of all parameters and buffers."""
    return {
        f"{key}.{name}": value.detach().clone()
        for key, module in method.model_dict.items()
        for name, value in module.state_dict().items()
    }


def part(batch: Batch, start: int, stop: int) -> Batch:
    """Some samples of a batch."""
    rows = slice(start, stop)
    return evolve(
        batch,
        latents=map_latents(lambda latents: latents[rows], batch.clean_latents),
        cond=batch.cond[rows],
        ids=batch.ids[rows],
        trajectory=None if batch.trajectory is None else batch.trajectory[rows],
    )


SavedRun: TypeAlias = dict[str, dict[str, Any]]
"""By kind of state, the ``state_dict`` of each object; torch types these so."""


def saved_state(method: TrainableMethod) -> SavedRun:
    """Return all that a checkpoint holds of a run, copied."""
    return copy.deepcopy(
        {
            "method": method.state_dict(),
            "method_rank": dict(method.rank_state()),
            "streams": method.streams.state_dict(),
            "modules": {k: m.state_dict() for k, m in method.model_dict.items()},
            "optimizers": {k: o.state_dict() for k, o in method.optimizer_dict.items()},
            "schedulers": {k: s.state_dict() for k, s in method.scheduler_dict.items()},
        }
    )


def restore_state(method: TrainableMethod, state: SavedRun) -> None:
    """Put a ``saved_state`` back into a method on other models."""
    for key, module in method.model_dict.items():
        module.load_state_dict(state["modules"][key])
    for key, optimizer in method.optimizer_dict.items():
        optimizer.load_state_dict(state["optimizers"][key])
    for key, scheduler in method.scheduler_dict.items():
        scheduler.load_state_dict(state["schedulers"][key])
    method.streams.load_state_dict(state["streams"])
    method.load_state_dict(state["method"])
    method.load_rank_state(state["method_rank"])
