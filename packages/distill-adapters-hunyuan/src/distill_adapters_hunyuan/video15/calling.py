"""One call of a HunyuanVideo 1.5 transformer, as its two pipelines make it.

Letters: B batch, C channels, T latent frames, H and W latent height and width, L text tokens, G
tokens of ByT5.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from distill_diffusers.calls.precision import call_in_precision
from distill_protocols import RoleHandle
from torch import Tensor

from distill_adapters_hunyuan.video15.kind import HUNYUAN_VIDEO15, IMAGE_TOKENS, uses_meanflow


def call_transformer(
    role: RoleHandle,
    latents: Tensor,
    t: Tensor,
    text: Tensor,
    text_mask: Tensor,
    glyphs: Tensor,
    glyph_mask: Tensor,
    image_latents: Tensor | None = None,
    image_embeds: Tensor | None = None,
    *,
    next_t: Tensor | None = None,
) -> Tensor:
    """Return v of x_t, both [B, C, T, H, W], in the precision of the role.

    Args:
        latents: x_t.
        t: [B].
        text: [B, L, D].
        text_mask: [B, L], 1 at tokens that are attended to.
        glyphs: [B, G, D'].
        glyph_mask: [B, G].
        image_latents: [B, C, 1, H, W] of a first frame; None: from text alone.
        image_embeds: [B, 729, D''] of it.
        next_t: of a model of average velocities, the t [] that the step ends at; None: t itself,
            where the average is the velocity at t.
    """
    name = HUNYUAN_VIDEO15.modules[0]
    transformer: Any = role.modules[name]
    config = transformer.config
    if image_embeds is None:
        image_embeds = latents.new_zeros(len(latents), IMAGE_TOKENS, config.image_embed_dim)
    end = None
    if uses_meanflow(config):
        end = t.float() if next_t is None else next_t.to(t.device).expand(len(t)).float()
    with (
        call_in_precision(role, name, HUNYUAN_VIDEO15, latents.device) as dtype,
        _time_embedded_in(transformer, dtype),
    ):
        (v,) = transformer(
            hidden_states=with_image_channels(latents, image_latents).to(dtype),
            timestep=t.float(),
            timestep_r=end,
            encoder_hidden_states=text.to(dtype),
            encoder_attention_mask=text_mask.to(dtype),
            encoder_hidden_states_2=glyphs.to(dtype),
            encoder_attention_mask_2=glyph_mask.to(dtype),
            image_embeds=image_embeds.to(dtype),
            return_dict=False,
        )
    return v


@contextlib.contextmanager
def _time_embedded_in(transformer: Any, dtype: torch.dtype) -> Iterator[None]:
    """Cast sines and cosines of t to the type of the weights that read them.

    The model casts them to the type of t itself, so that its pipelines round t to 16 bits.
    """
    if dtype == torch.float32:
        yield
        return

    def cast(_module: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(value.to(dtype) for value in args)

    embed = transformer.time_embed
    layers = [embed.timestep_embedder, embed.timestep_embedder_r]
    hooks = [layer.register_forward_pre_hook(cast) for layer in layers if layer is not None]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def with_image_channels(x_t: Tensor, image_latents: Tensor | None) -> Tensor:
    """Append the channels of a first frame and of its mask: [B, 2C + 1, T, H, W].

    The mask is 1 on the first latent frame; without a picture all of them are 0.
    """
    rows, channels, frames, height, width = x_t.shape
    given = x_t.new_zeros(rows, channels + 1, frames, height, width)
    if image_latents is not None:
        given[:, :channels, :1] = image_latents.to(given)
        given[:, channels, 0] = 1
    return torch.cat([x_t, given], dim=1)
