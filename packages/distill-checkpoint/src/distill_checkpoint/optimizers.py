"""Optimizer state by parameter name: torch's own state_dict numbers the parameters instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from distill_protocols import CheckpointError
from torch import Tensor, nn
from torch.optim import Optimizer


def optimizer_state(optimizer: Optimizer, module: nn.Module, where: str) -> dict[str, Any]:
    """``{"state": {fqn: {...}}, "param_groups": [{..., "params": [fqn, ...]}]}``.

    Raises:
        CheckpointError: the optimizer updates a parameter that is not in ``module``.
    """
    names = _names(optimizer, module, where)
    raw = optimizer.state_dict()
    return {
        "state": {names[number]: state for number, state in raw["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]}
            for group in raw["param_groups"]
        ],
    }


def load_optimizer_state(
    optimizer: Optimizer, module: nn.Module, state: Mapping[str, Any], where: str
) -> None:
    """Put back what ``optimizer_state`` gave, exactly.

    Raises:
        CheckpointError: the groups hold other parameters than those saved.
    """
    names = _names(optimizer, module, where)
    numbers = {name: number for number, name in enumerate(names)}
    saved = [group["params"] for group in state["param_groups"]]
    present = [
        [names[number] for number in group["params"]]
        for group in optimizer.state_dict()["param_groups"]
    ]
    if saved != present:
        raise CheckpointError(
            f"optimizer {where} has groups of other parameters than this run's "
            f"({_difference(saved, present)}), so moments would go to the wrong weights. Resume "
            "with the models and optimizer groups of the saved run."
        )
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


def _restore_dtypes(optimizer: Optimizer, names: list[str], state: Mapping[str, Any]) -> None:
    # torch casts moments to their parameter's dtype, which rounds fp32 moments of a bf16 weight.
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    for name, parameter in zip(names, parameters, strict=True):
        for key, saved in state.get(name, {}).items():
            loaded = optimizer.state[parameter][key]
            if isinstance(saved, Tensor) and loaded.dtype != saved.dtype:
                optimizer.state[parameter][key] = saved.to(loaded.device)


def _names(optimizer: Optimizer, module: nn.Module, where: str) -> list[str]:
    """The parameters' names in the order of torch's numbers: group by group."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = sum(parameter not in names for parameter in parameters)
    if foreign:
        raise CheckpointError(
            f"optimizer {where} updates {foreign} parameter(s) that are not its module's, so they "
            "have no name to be saved under. A module's optimizer must update that module only."
        )
    return [names[parameter] for parameter in parameters]


def _difference(saved: list[list[str]], present: list[list[str]]) -> str:
    def flat(groups: Iterable[Iterable[str]]) -> set[str]:
        return {name for group in groups for name in group}

    lost, new = sorted(flat(saved) - flat(present)), sorted(flat(present) - flat(saved))
    if not lost and not new:
        return "the same parameters in other groups or another order"
    return f"only saved: {', '.join(lost) or 'none'}; only in this run: {', '.join(new) or 'none'}"
