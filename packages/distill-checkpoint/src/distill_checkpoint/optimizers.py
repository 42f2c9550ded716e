"""Optimizer state by parameter name: torch's own state_dict numbers the parameters instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from distill_protocols import CheckpointError, TensorInfo
from torch import Tensor, nn
from torch.optim import Optimizer

from distill_checkpoint.tensors import StoredTensors
from distill_checkpoint.values import unpack


def optimizer_state(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], where: str
) -> dict[str, Any]:
    """Take an optimizer's ``state_dict``, with names of parameters in place of torch's numbers.

    ``{"state": {name: {...}}, "param_groups": [{..., "params": [name, ...]}]}``

    Raises:
        CheckpointError: the optimizer updates something that is not in ``parameters``.
    """
    names = _names(optimizer, parameters, where)
    raw = optimizer.state_dict()
    return {
        "state": {names[number]: state for number, state in raw["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]}
            for group in raw["param_groups"]
        ],
    }


def groups_problem(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], packed: Any, where: str
) -> str | None:
    """Compare the parameters of saved groups with those of the optimizer's.

    Returns:
        Why the saved state does not fit; None: it does.
    """
    names = _names(optimizer, parameters, where)
    saved = [group["params"] for group in packed["param_groups"]]
    present = [
        [names[number] for number in group["params"]]
        for group in optimizer.state_dict()["param_groups"]
    ]
    if saved == present:
        return None
    return (
        f"optimizer {where} has groups of other parameters than this run's "
        f"({_difference(saved, present)}), so moments would go to the wrong weights"
    )


def load_optimizer_state(
    optimizer: Optimizer,
    parameters: Mapping[str, nn.Parameter],
    packed: Any,
    stored: StoredTensors,
    where: str,
) -> None:
    """Load the state of ``optimizer_state`` exactly, reading each moment to where it will stay.

    Args:
        packed: its JSON (see ``values.py``).
        stored: its tensors.
    """
    names = _names(optimizer, parameters, where)
    numbers = {name: number for number, name in enumerate(names)}
    tensors = {}
    for name, info in stored.infos.items():
        # A moment is stored as "state/<parameter>/<key>".
        parameter = parameters.get(name.removeprefix("state/").rpartition("/")[0])
        tensors[name] = _empty_moment(info, parameter)
    stored.read_into(tensors)
    state = unpack(packed, tensors)
    optimizer.load_state_dict(
        {
            "state": {numbers[name]: dict(value) for name, value in state["state"].items()},
            "param_groups": [
                {**group, "params": [numbers[name] for name in group["params"]]}
                for group in state["param_groups"]
            ],
        }
    )
    _restore_dtypes(optimizer, names, state["state"])


def _empty_moment(info: TensorInfo, parameter: nn.Parameter | None) -> Tensor:
    """An empty tensor where torch keeps such a moment: on the parameter's device, laid out and
    sharded as it is, so that nothing is gathered or moved afterwards."""
    if parameter is None:
        return torch.empty(info.size, dtype=info.dtype)
    if tuple(parameter.shape) == info.size:
        return torch.empty_like(parameter.detach(), dtype=info.dtype)
    return torch.empty(info.size, dtype=info.dtype, device=parameter.device)


def _restore_dtypes(optimizer: Optimizer, names: list[str], state: Mapping[str, Any]) -> None:
    # torch casts moments to their parameter's dtype, which rounds fp32 moments of a bf16 weight.
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    for name, parameter in zip(names, parameters, strict=True):
        for key, saved in state.get(name, {}).items():
            loaded = optimizer.state[parameter][key]
            if isinstance(saved, Tensor) and loaded.dtype != saved.dtype:
                optimizer.state[parameter][key] = saved.to(loaded.device)


def _names(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], where: str) -> list[str]:
    """The parameters' names in the order of torch's numbers: group by group."""
    names = {parameter: name for name, parameter in parameters.items()}
    updated = [p for group in optimizer.param_groups for p in group["params"]]
    unnamed = sum(parameter not in names for parameter in updated)
    if unnamed:
        raise CheckpointError(
            f"optimizer {where} updates {unnamed} parameter(s) that are not among those that its "
            "module trains, so they have no name to be saved under. A module's optimizer must "
            "update that module's trained parameters only."
        )
    return [names[parameter] for parameter in updated]


def _difference(saved: list[list[str]], present: list[list[str]]) -> str:
    def flat(groups: Iterable[Iterable[str]]) -> set[str]:
        return {name for group in groups for name in group}

    lost, new = sorted(flat(saved) - flat(present)), sorted(flat(present) - flat(saved))
    if not lost and not new:
        return "the same parameters in other groups or another order"
    return f"only saved: {', '.join(lost) or 'none'}; only in this run: {', '.join(new) or 'none'}"
