"""The precision of one model call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from distill_protocols import DTYPES, RoleHandle

from distill_diffusers.kinds import ModelKind


@contextlib.contextmanager
def call_in_precision(
    role: RoleHandle, module: str, kind: ModelKind, device: torch.device
) -> Iterator[torch.dtype]:
    """Set up the precision in which ``module`` of ``role`` is called; yield its inputs' dtype.

    The dtype is that of the parameter ``kind.stored_like``. Any other parameter would not do: some
    of them, adapters among them, stay in fp32 where the rest has 16 bits.

    Autocast covers fp32 weights only. Over weights in 16 bits it would also run those modules in
    16 bits that loading kept in fp32 (time embedding, adapters), while diffusers and peft cast at
    their borders by themselves.

    Args:
        device: where the call computes; the weights may be elsewhere between calls.
    """
    dtype = role.modules[module].get_parameter(kind.stored_like).dtype
    if role.precision == "fp32":
        yield dtype
        return
    # Turned off rather than left alone over 16 bits: a caller's own autocast would still cover it.
    is_wide = dtype == torch.float32
    with torch.autocast(device.type, dtype=DTYPES[role.precision], enabled=is_wide):
        yield dtype
