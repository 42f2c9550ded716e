"""One call of the transformer in the precision of its role, by the adapter and by plans.

Letters: B batch, C channels, T latent frames, H and W latent height and width, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from distill_diffusers.calls.precision import call_in_precision
from distill_protocols import RoleHandle
from torch import Tensor

from distill_adapters_longcat.kind import DIT, LONGCAT
from distill_adapters_longcat.layers import KeysAndValues


def call_transformer(
    role: RoleHandle,
    latents: Tensor,
    t: Tensor,
    text: Tensor,
    text_mask: Tensor,
    *,
    given_frames: int = 0,
    past: Sequence[KeysAndValues] | None = None,
) -> Tensor:
    """Return v of x_t [B, C, T, H, W]; the transformer predicts ``-v``.

    Args:
        latents: x_t.
        t: [B] or [B, T].
        text: [B, L, D].
        text_mask: [B, L], 1 at tokens of the prompt.
        given_frames, past: see ``LongCatVideoTransformer3DModel.forward``.
    """
    with call_in_precision(role, DIT, LONGCAT, latents.device) as dtype:
        (prediction,) = role.modules[DIT](
            hidden_states=latents.to(dtype),
            timestep=t.float(),
            encoder_hidden_states=text.to(dtype),
            encoder_attention_mask=text_mask,
            given_frames=given_frames,
            past=past,
            return_dict=False,
        )
    return -prediction


def read_frames(role: RoleHandle, given: Tensor) -> tuple[KeysAndValues, ...]:
    """Return, by block, keys and values of given clean frames [B, C, K, H, W], at t = 0."""
    t = torch.zeros(given.shape[0], given.shape[2], device=given.device)
    with call_in_precision(role, DIT, LONGCAT, given.device) as dtype:
        _, past = role.modules[DIT](
            hidden_states=given.to(dtype), timestep=t, keep=True, return_dict=False
        )
    return past
