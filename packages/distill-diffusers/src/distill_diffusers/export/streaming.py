"""Weight files written tensor by tensor, from whatever reads them one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from distill_protocols import ContractError, TensorInfo, WeightsError
from distill_runtime import DTYPE_NAMES, file_layout, raw_bytes
from torch import Tensor


def write_safetensors(
    file: Path,
    facts: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the tensors of ``facts``, holding one at a time.

    Args:
        facts: what will be written, under its name in the file.
        read: name -> the tensor on the CPU, with just these facts.
        metadata: of the header, besides ``{"format": "pt"}``.

    Raises:
        WeightsError: a dtype that no Wan model has.
        ContractError: ``read`` returned something else than ``facts`` says.
        OSError: the file cannot be written.
    """
    for name, fact in facts.items():
        kind = fact.dtype
        if kind not in DTYPE_NAMES or not kind.is_floating_point or kind.itemsize < 2:
            raise WeightsError(
                f"{name} is {fact}; weights are written as floats of 16 bits or more only, because "
                "no Wan model has others. Give precision"
            )
    order, header = file_layout(facts, metadata or {})
    with file.open("wb") as stream:
        stream.write(header)
        for name in order:
            tensor = read(name)
            found = TensorInfo(tuple(tensor.shape), tensor.dtype)
            if found != facts[name]:
                raise ContractError(
                    f"{name} is {found}, but its source said {facts[name]}; what is written would "
                    "not be what the header says. WeightSource.describe and read must agree"
                )
            stream.write(raw_bytes(tensor))
