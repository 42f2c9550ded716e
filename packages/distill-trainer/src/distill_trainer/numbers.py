"""Many 0-d tensors as Python floats, for one wait a device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from distill_trainer.shards import local


def to_floats(values: Sequence[Tensor | float]) -> list[float]:
    """``values`` as floats, in order; tensors of one device are fetched together.

    Of a DTensor its part on this rank: only one rank may be asking.
    """
    values = [local(value) if isinstance(value, Tensor) else value for value in values]
    result = [0.0] * len(values)
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            by_device[value.device].append(index)
        else:
            result[index] = float(value)
    for indices in by_device.values():
        together = torch.stack([values[i].detach().double() for i in indices])  # type: ignore[union-attr]
        for index, number in zip(indices, together.tolist(), strict=True):
            result[index] = number
    return result
