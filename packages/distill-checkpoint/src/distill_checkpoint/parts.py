"""Which of everything there is in a run."""

from __future__ import annotations

from typing import Any

import torch
from distill_protocols import CheckpointError, ModelBundle, RoleHandle, WeightAverage
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distill_checkpoint.layout import Part
from distill_checkpoint.tensors import to_local


def modules(bundle: ModelBundle) -> dict[Part, RoleHandle]:
    """Every module that is trained, with its role."""
    return {
        (name, key): role
        for name, role in bundle.roles.items()
        if role.trainable
        for key in role.modules
    }


def optimizers(bundle: ModelBundle) -> dict[Part, Optimizer]:
    return {(n, k): item for n, role in bundle.roles.items() for k, item in role.optimizers.items()}


def schedulers(bundle: ModelBundle) -> dict[Part, LRScheduler]:
    return {(n, k): item for n, role in bundle.roles.items() for k, item in role.schedulers.items()}


def averages(bundle: ModelBundle) -> dict[Part, WeightAverage]:
    return {(n, k): item for n, role in bundle.roles.items() for k, item in role.ema.items()}


def kinds(bundle: ModelBundle) -> dict[str, dict[Part, Any]]:
    """All of the above, by the names that they have in a checkpoint."""
    return {
        "roles": modules(bundle),
        "optimizers": optimizers(bundle),
        "schedulers": schedulers(bundle),
        "ema": averages(bundle),
    }


def weights(role: RoleHandle, key: str) -> dict[str, Tensor]:
    """What training changes in a module; the tensors themselves.

    Of an FSDP module its parts (DTensor), also where a forward pass without gradients has left the
    root's weights whole: its ``state_dict`` puts the parts back first, and with them what
    ``trained_parameters`` finds.

    Raises:
        CheckpointError: the module's state holds something else than tensors.
    """
    state = role.moving_state(key)
    other = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise CheckpointError(
            f"{role.name}.{key}: {', '.join(other)} in its state_dict is no tensor, and only "
            "tensors go into a weight file. Move it into a buffer or out of get_extra_state."
        )
    return state


def non_finite_weights(bundle: ModelBundle) -> list[str]:
    """``role.module: parameter`` of every trained parameter that holds inf or nan on this rank."""
    parameters = {
        f"{name}.{key}: {parameter_name}": to_local(parameter.detach())
        for (name, key), role in modules(bundle).items()
        for parameter_name, parameter in role.trained_parameters(key).items()
    }
    by_device: dict[torch.device, list[str]] = {}
    for name, value in parameters.items():
        by_device.setdefault(value.device, []).append(name)
    found = []
    for names in by_device.values():
        # One wait for each device, not one a tensor.
        finite = torch.stack([torch.isfinite(parameters[name]).all() for name in names]).tolist()
        found += [name for name, good in zip(names, finite, strict=True) if not good]
    return found
