"""Read the tensors of a condition, with the shapes that a model takes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from distill_protocols import Condition, ConditioningError
from torch import Tensor


def read_condition(
    cond: Condition, shapes: Mapping[str, tuple[int, ...]], device: torch.device
) -> dict[str, Tensor]:
    """Give the tensors that ``shapes`` names, on ``device``.

    Args:
        shapes: by name, of one row; ``FamilyPlugin.condition_shapes``.

    Raises:
        ConditioningError: one is missing, or of another shape.
    """
    for name, shape in shapes.items():
        tensor = cond.tensors.get(name)
        if tensor is None or tuple(tensor.shape[1:]) != shape:
            actual = "absent" if tensor is None else f"{list(tensor.shape[1:])} a row"
            raise ConditioningError(
                f"{name!r} of the condition is {actual}, and the model takes {list(shape)}: "
                "padding is attended too, so another length gives other results, and another "
                "width does not fit. Encode the prompts with this run's encoders and "
                "max_sequence_length"
            )
    return {name: cond.tensors[name].to(device) for name in shapes}
