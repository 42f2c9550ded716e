"""One call of a Wan transformer, in the precision of its role: by the adapter, and by plans.

Letters: B batch, C channels, T latent frames, H and W latent height and width, L tokens, D width.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from distill_protocols import DTYPES, RoleHandle
from torch import Tensor


def transformer_of(role: RoleHandle) -> WanTransformer3DModel:
    """Its only module."""
    return cast(WanTransformer3DModel, role.modules["transformer"])


def predicted(role: RoleHandle, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """v [B, C, T, H, W] in the precision of the call, from x_t, t [B] and text [B, L, D]."""
    transformer = transformer_of(role)
    # Not of just any parameter: some stay in fp32 where the rest has 16 bits, adapters among
    # them. No LoRA is ever put on this one, as it is no linear layer.
    dtype = transformer.patch_embedding.weight.dtype
    with _precision_of_a_call(role, dtype, x_t.device):
        (v,) = transformer(
            hidden_states=x_t.to(dtype),
            timestep=t.float(),
            encoder_hidden_states=text.to(dtype),
            return_dict=False,
        )
    return v


def _precision_of_a_call(
    role: RoleHandle, dtype: torch.dtype, device: torch.device
) -> AbstractContextManager[Any]:
    """Autocast over fp32 weights only: it would run the modules that ``load_role`` kept in fp32
    (time embedding, adapters) in 16 bits after all, while diffusers and peft cast at their
    borders by themselves."""
    if role.precision == "fp32":
        return contextlib.nullcontext()
    # Of the call's device: weights may be elsewhere between calls.
    return torch.autocast(device.type, dtype=DTYPES[role.precision], enabled=dtype == torch.float32)
