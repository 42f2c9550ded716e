"""How tensors lie in a safetensors file, for writers that hold one of them at a time.

safetensors' own writers take all tensors of a file at once, so whoever saves a model needs it in
memory a second time. The format (huggingface.co/docs/safetensors) is eight bytes of header length,
a JSON header and the tensors' bytes after each other: who knows the shapes can write as he reads.

Tensors begin at multiples of 64 bytes, as in memory that torch allocates. Readers map the file and
compute on it there, and a CPU's matrix product of weights that lie otherwise differs in its last
bits (files of ``save_file``, at multiples of 8, gave other clips than the trainer).
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distill_protocols.weights import TensorFacts

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64",
    torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""What the format can hold, by its own names."""

ALIGNMENT = 64


def file_layout(
    facts: Mapping[str, TensorFacts], metadata: Mapping[str, str]
) -> tuple[tuple[str, ...], bytes]:
    """The order of the tensors in the file, and everything that stands before the first.

    Args:
        facts: what goes in; every dtype is in ``DTYPE_NAMES``.
        metadata: of the header, besides ``{"format": "pt"}``, by which readers know torch's.
    """

    def place(name: str) -> tuple[bool, int, str]:
        # The format has no gaps, so what would push the others aside comes last, the widest type
        # first, so that none begins within a number. (Of a real Wan nothing is pushed aside.)
        fact = facts[name]
        return fact.nbytes % ALIGNMENT != 0, -fact.dtype.itemsize, name

    order = tuple(sorted(facts, key=place))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in order:
        begin, end = end, end + facts[name].nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[facts[name].dtype],
            "shape": list(facts[name].size),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return order, len(text).to_bytes(8, "little") + text


def raw_bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as they lie in memory, on the CPU; no copy of one that is there."""
    value = tensor.detach().cpu().contiguous()
    if not value.nbytes:
        return memoryview(b"")
    # Not through numpy, which torch does not bring, and which has no bf16.
    memory: Any = (ctypes.c_char * value.nbytes).from_address(value.data_ptr())
    memory.owner = value  # as long as anyone looks at its bytes
    return memoryview(memory).cast("B")
