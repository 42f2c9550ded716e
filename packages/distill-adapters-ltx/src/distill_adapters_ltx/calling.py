"""One call of an LTX transformer in the precision of its role, by the adapter and by plans."""

from __future__ import annotations

from typing import cast

from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from distill_diffusers.calls.precision import call_in_precision
from distill_protocols import RoleHandle
from torch import Tensor

from distill_adapters_ltx.kind import LTX
from distill_adapters_ltx.packing import pack, unpack
from distill_adapters_ltx.positions import token_positions

MODULE = LTX.modules[0]


def transformer_of(role: RoleHandle) -> LTXVideoTransformer3DModel:
    """Return the role's transformer."""
    return cast(LTXVideoTransformer3DModel, role.modules[MODULE])


def call_transformer(
    role: RoleHandle, x_t: Tensor, t: Tensor, text: Tensor, mask: Tensor, *, frame_rate: float
) -> Tensor:
    """Return v [B, C, T, H, W] in the precision of the call.

    Args:
        x_t: [B, C, T, H, W].
        t: [B].
        text: [B, L, D].
        mask: [B, L], 1 at tokens that are attended to.
        frame_rate: frames a second.
    """
    frames, height, width = size = (x_t.shape[2], x_t.shape[3], x_t.shape[4])
    positions = token_positions(size, frame_rate, causal=False, device=x_t.device)
    with call_in_precision(role, MODULE, LTX, x_t.device) as dtype:
        (tokens,) = transformer_of(role)(
            hidden_states=pack(x_t).to(dtype),
            encoder_hidden_states=text.to(x_t.device, dtype),
            timestep=t.float(),
            encoder_attention_mask=mask.to(x_t.device),
            num_frames=frames,
            height=height,
            width=width,
            video_coords=positions.expand(len(x_t), -1, -1),
            return_dict=False,
        )
    return unpack(tokens, size)
