"""One call of a Wan transformer, in the precision of its role: by the adapter, and by plans.

Letters: B batch, C channels, T latent frames, H and W latent height and width, L tokens, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from distill_adapters_wan.experts import HIGH
from distill_protocols import DTYPES, RoleHandle
from distill_protocols.plugins import EMPTY
from torch import Tensor


def transformer_of(role: RoleHandle, module: str = HIGH) -> WanTransformer3DModel:
    """Its only one, or of two experts the one of this name."""
    return cast(WanTransformer3DModel, role.modules[module])


def predicted(
    role: RoleHandle,
    hidden: Tensor,
    times: Tensor,
    text: Tensor,
    image: Tensor | None = None,
    *,
    module: str = HIGH,
    arguments: Mapping[str, Any] = EMPTY,
) -> Tensor:
    """v [B, C, T, H, W] in the precision of the call.

    Args:
        hidden: x_t [B, C, T, H, W]; for a model that reads a picture so, with its channels too.
        times: [B], or one a token.
        text: [B, L, D].
        image: a picture's embedding [B, tokens, D], for a model that reads one.
        module: the expert.
        arguments: further ones of the transformer.
    """
    transformer = transformer_of(role, module)
    # Not of just any parameter: some stay in fp32 where the rest has 16 bits, adapters among
    # them. No LoRA is ever put on this one, as it is no linear layer.
    dtype = transformer.patch_embedding.weight.dtype
    with _precision_of_a_call(role, dtype, hidden.device):
        (v,) = transformer(
            hidden_states=hidden.to(dtype),
            timestep=times.float(),
            encoder_hidden_states=text.to(dtype),
            encoder_hidden_states_image=None if image is None else image.to(dtype),
            return_dict=False,
            **arguments,
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
