"""State dicts as JSON plus tensors, where others use pickle, which can run code.

An optimizer's is first given names of parameters, where torch numbers them.

JSON has no tensors, tuples, nan, or keys other than strings. Each of these becomes an object with
one key that begins with ``$``:

=================================  ==================================================
``{"$tensor": name}``              in the safetensors files beside the JSON
``{"$scalar": [dtype, value]}``    a 0-d tensor
``{"$tuple": [...]}``              a tuple
``{"$dict": [[key, value], ...]}`` a mapping with keys that JSON or this table would misread
``{"$counter": [[k, v], ...]}``    collections.Counter (MultiStepLR's milestones)
``{"$float": "nan"}``              nan, inf, -inf
=================================  ==================================================
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from distill_protocols import CheckpointError, TensorInfo
from distill_runtime import counted
from torch import Tensor, nn
from torch.optim import Optimizer

from distill_checkpoint.tensors import StoredTensors, to_full

_SCALAR_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
    )
}  # fmt: skip


# -- any state -----------------------------------------------------------------------------------


def pack(value: object, where: str) -> tuple[Any, dict[str, Tensor]]:
    """Split ``value`` into JSON and tensors.

    Args:
        value: nested mappings, lists and tuples of tensors, numbers, strings, bools and None.
        where: what it is the state of, for the error.

    Raises:
        CheckpointError: something in it is neither, with its place.
    """
    tensors: dict[str, Tensor] = {}
    return _pack(value, where, (), tensors), tensors


def unpack(packed: object, tensors: Mapping[str, Tensor]) -> Any:
    """Return the inverse of ``pack``: equal values, types and dtypes; 0-d tensors on the CPU.

    Raises:
        CheckpointError: ``packed`` was not made by ``pack``.
    """
    try:
        return _unpack(packed, tensors)
    except (
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
        OverflowError,
    ) as error:
        raise CheckpointError(
            f"a saved state is none that this release writes ({type(error).__name__}: {error}), so "
            "somebody has edited it. Use another checkpoint."
        ) from error


def _unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(packed, list):
        return [_unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if len(packed) == 1 and (tag := next(iter(packed))) in _READERS:
        return _READERS[tag](packed[tag], tensors)
    return {key: _unpack(item, tensors) for key, item in packed.items()}


def _pack(value: Any, where: str, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    def inner(item: Any, key: object) -> Any:
        return _pack(item, where, (*path, str(key)), tensors)

    match value:
        case None | bool() | str():
            return value
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
        case Tensor():
            return _pack_tensor(value, "/".join(path), tensors)
        case Counter():
            return {"$counter": [[inner(k, "key"), count] for k, count in value.items()]}
        case Mapping():
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: inner(item, key) for key, item in value.items()}
            return {"$dict": [[inner(k, "key"), inner(v, k)] for k, v in value.items()]}
        case tuple():
            return {"$tuple": [inner(item, i) for i, item in enumerate(value)]}
        case list():
            return [inner(item, i) for i, item in enumerate(value)]
    raise CheckpointError(
        f"{where}: {'.'.join(path) or 'its state'} is a {type(value).__name__}, which a checkpoint "
        "cannot hold: only tensors and JSON values go in, because what holds anything (pickle) can "
        "run code. Turn it into these in state_dict."
    )


def _pack_tensor(value: Tensor, name: str, tensors: dict[str, Tensor]) -> Any:
    dtype = str(value.dtype).removeprefix("torch.")
    if value.ndim == 0 and dtype in _SCALAR_DTYPES:
        return {"$scalar": [dtype, _pack(to_full(value).item(), name, (), tensors)]}
    # {"a/b": t} and {"a": {"b": t}} would be called the same.
    unique, twin = name, 1
    while unique in tensors:
        twin += 1
        unique = f"{name}#{twin}"
    tensors[unique] = value
    return {"$tensor": unique}


def _read_scalar(body: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    dtype, value = body
    return torch.tensor(_unpack(value, tensors), dtype=_SCALAR_DTYPES[dtype])


_READERS: Mapping[str, Callable[[Any, Mapping[str, Tensor]], Any]] = {
    "$tensor": lambda body, tensors: tensors[body],
    "$scalar": _read_scalar,
    "$tuple": lambda body, tensors: tuple(_unpack(item, tensors) for item in body),
    "$dict": lambda body, tensors: {_unpack(k, tensors): _unpack(v, tensors) for k, v in body},
    "$counter": lambda body, tensors: Counter({_unpack(k, tensors): v for k, v in body}),
    "$float": lambda body, tensors: float(body),
}


# -- optimizers ----------------------------------------------------------------------------------


def optimizer_state(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], where: str
) -> dict[str, object]:
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
    packed: object,
    stored: StoredTensors,
    where: str,
    *,
    keep_settings: bool = False,
) -> None:
    """Load the state of ``optimizer_state`` exactly, reading each moment to where it will stay.

    Args:
        packed: its JSON, of ``pack``.
        stored: its tensors.
        keep_settings: leave the optimizer its own weight decay, eps and the like.
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
    groups = [
        {**group, "params": [numbers[name] for name in group["params"]]}
        for group in state["param_groups"]
    ]
    if keep_settings:
        own = optimizer.state_dict()["param_groups"]
        groups = [
            {**then, **now, "params": then["params"]} for then, now in zip(groups, own, strict=True)
        ]
    moments = {numbers[name]: dict(value) for name, value in state["state"].items()}
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    _restore_dtypes(optimizer, names, state["state"])


def _empty_moment(info: TensorInfo, parameter: nn.Parameter | None) -> Tensor:
    """Return an empty tensor where torch keeps such a moment: on the parameter's device, laid out
    and sharded as it is, so that nothing is gathered or moved afterwards."""
    if parameter is None:
        return torch.empty(info.size, dtype=info.dtype)
    if tuple(parameter.shape) == info.size:
        return torch.empty_like(parameter.detach(), dtype=info.dtype)
    return torch.empty(info.size, dtype=info.dtype, device=parameter.device)


def _restore_dtypes(
    optimizer: Optimizer, names: list[str], state: Mapping[str, Mapping[str, object]]
) -> None:
    # torch casts moments to their parameter's dtype, which rounds fp32 moments of a bf16 weight.
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    for name, parameter in zip(names, parameters, strict=True):
        for key, saved in state.get(name, {}).items():
            loaded = optimizer.state[parameter][key]
            if isinstance(saved, Tensor) and loaded.dtype != saved.dtype:
                optimizer.state[parameter][key] = saved.to(loaded.device)


def _names(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], where: str) -> list[str]:
    """Return the parameters' names in the order of torch's numbers: group by group."""
    names = {parameter: name for name, parameter in parameters.items()}
    updated = [p for group in optimizer.param_groups for p in group["params"]]
    unnamed = sum(parameter not in names for parameter in updated)
    if unnamed:
        raise CheckpointError(
            f"optimizer {where} updates {counted(unnamed, 'parameter')} that are not among those "
            "that its module trains, so they have no name to be saved under. A module's optimizer "
            "must update that module's trained parameters only."
        )
    return [names[parameter] for parameter in updated]


def _difference(saved: list[list[str]], present: list[list[str]]) -> str:
    def flat(groups: Iterable[Iterable[str]]) -> set[str]:
        return {name for group in groups for name in group}

    lost, new = sorted(flat(saved) - flat(present)), sorted(flat(present) - flat(saved))
    if not lost and not new:
        return "the same parameters in other groups or another order"
    return f"only saved: {', '.join(lost) or 'none'}; only in this run: {', '.join(new) or 'none'}"
