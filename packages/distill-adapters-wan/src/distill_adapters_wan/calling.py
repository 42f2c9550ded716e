"""One call of a Wan transformer in the precision of its role, by the adapter and by plans.

Letters: B batch, C channels, T latent frames, H and W latent height and width, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from distill_diffusers.calls.precision import call_in_precision
from distill_protocols import RoleHandle
from distill_protocols.plugins import EMPTY
from torch import Tensor

from distill_adapters_wan.experts import HIGH
from distill_adapters_wan.images.shapes import reads_pairs
from distill_adapters_wan.kind import WAN


def transformer_of(role: RoleHandle, module: str | None = None) -> WanTransformer3DModel:
    """Return the role's transformer: the one of this name, or its first of two experts, which are
    built alike."""
    name = next(iter(role.modules)) if module is None else module
    return cast(WanTransformer3DModel, role.modules[name])


def call_transformer(
    role: RoleHandle,
    hidden: Tensor,
    times: Tensor,
    text: Tensor,
    image: Tensor | None = None,
    *,
    module: str = HIGH,
    arguments: Mapping[str, object] = EMPTY,
) -> Tensor:
    """Return v [B, C, T, H, W] in the precision of the call.

    Args:
        hidden: x_t [B, C, T, H, W], with the channels of a picture for a model that reads one so.
        times: [B], or one a token.
        text: [B, L, D].
        image: a picture's embedding [B, tokens, D], for a model that reads one; that of a first and
            a last frame has the tokens of both.
        module: the expert.
        arguments: further ones of the transformer.
    """
    transformer = transformer_of(role, module)
    if image is not None and reads_pairs(transformer.config):
        # Its embedder takes the pictures of a row as two rows, and puts them together again.
        image = image.unflatten(1, (2, -1)).flatten(0, 1)
    with call_in_precision(role, module, WAN, hidden.device) as dtype:
        (v,) = transformer(
            hidden_states=hidden.to(dtype),
            timestep=times.float(),
            encoder_hidden_states=text.to(dtype),
            encoder_hidden_states_image=None if image is None else image.to(dtype),
            return_dict=False,
            **arguments,
        )
    return v
