"""State as JSON plus tensors, for what others use pickle, which can run code.

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
from collections.abc import Callable, Mapping
from typing import Any

import torch
from distill_protocols import CheckpointError
from torch import Tensor

from distill_checkpoint.tensors import to_full

_SCALAR_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
    )
}  # fmt: skip


def pack(value: Any, where: str) -> tuple[Any, dict[str, Tensor]]:
    """Split ``value`` into JSON and tensors.

    Args:
        value: nested mappings, lists and tuples of tensors, numbers, strings, bools and None.
        where: what it is the state of, for the error.

    Raises:
        CheckpointError: something in it is neither, with its place.
    """
    tensors: dict[str, Tensor] = {}
    return _pack(value, where, (), tensors), tensors


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of ``pack``: equal values, types and dtypes; 0-d tensors on the CPU."""
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if len(packed) == 1 and (tag := next(iter(packed))) in _READERS:
        return _READERS[tag](packed[tag], tensors)
    return {key: unpack(item, tensors) for key, item in packed.items()}


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
    return torch.tensor(unpack(value, tensors), dtype=_SCALAR_DTYPES[dtype])


_READERS: Mapping[str, Callable[[Any, Mapping[str, Tensor]], Any]] = {
    "$tensor": lambda body, tensors: tensors[body],
    "$scalar": _read_scalar,
    "$tuple": lambda body, tensors: tuple(unpack(item, tensors) for item in body),
    "$dict": lambda body, tensors: {unpack(k, tensors): unpack(v, tensors) for k, v in body},
    "$counter": lambda body, tensors: Counter({unpack(k, tensors): v for k, v in body}),
    "$float": lambda body, tensors: float(body),
}
