"""One call of the transformer in the precision of its role, by the adapter and by plans.

Letters: B batch, C channels, T latent frames, H and W latent height and width, L tokens, D width.
"""

from __future__ import annotations

from distill_diffusers.calls.precision import call_in_precision
from distill_protocols import RoleHandle
from torch import Tensor

from distill_adapters_longcat.kind import DIT, LONGCAT


def call_transformer(
    role: RoleHandle,
    latents: Tensor,
    t: Tensor,
    text: Tensor,
    text_mask: Tensor,
) -> Tensor:
    """Return v of x_t [B, C, T, H, W]; the transformer predicts ``-v``.

    Args:
        latents: x_t.
        t: [B] or [B, T].
        text: [B, L, D].
        text_mask: [B, L], 1 at tokens of the prompt.
    """
    with call_in_precision(role, DIT, LONGCAT, latents.device) as dtype:
        (prediction,) = role.modules[DIT](
            hidden_states=latents.to(dtype),
            timestep=t.float(),
            encoder_hidden_states=text.to(dtype),
            encoder_attention_mask=text_mask,
            return_dict=False,
        )
    return -prediction
