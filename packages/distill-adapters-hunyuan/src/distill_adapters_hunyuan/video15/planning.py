"""The transformer for plans: on fake tensors, which have no numbers, nothing can be picked by a
mask, as the model's own forward does with the tokens of both texts and of a picture."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_hunyuan_video15 import (
    HunyuanVideo15Transformer3DModel,
)
from torch import Tensor


class PlannedTransformer(HunyuanVideo15Transformer3DModel):
    """The model without the sorting of text tokens: the same layers on the same shapes, so that a
    call takes the same memory. From a picture it computes the same but for rounding, as no token
    of a text has a position; from text alone it attends the picture's tokens too."""

    def forward(  # type: ignore[override] - a call's own arguments alone
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        timestep_r: Tensor | None,
        encoder_hidden_states_2: Tensor,
        encoder_attention_mask_2: Tensor,
        image_embeds: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Compute [B, C, T, H, W] of the arguments of the model's own forward."""
        rows, _, frames, height, width = hidden_states.shape
        rotary = self.rope(hidden_states)
        temb = self.time_embed(timestep, timestep_r=timestep_r)
        hidden: Any = self.x_embedder(hidden_states)
        picture = self.image_embedder(image_embeds)
        glyphs = self.context_embedder_2(encoder_hidden_states_2)
        text = self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask)
        parts = [picture, glyphs, text]
        text = torch.cat([self._of_kind(part, 2 - i) for i, part in enumerate(parts)], dim=1)
        mask = torch.cat(
            [
                picture.new_ones(picture.shape[:2]),
                encoder_attention_mask_2,
                encoder_attention_mask,
            ],
            dim=1,
        ).bool()
        checkpointed: Any = self._gradient_checkpointing_func
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden, text = checkpointed(block, hidden, text, temb, mask, rotary)
            else:
                hidden, text = block(hidden, text, temb, mask, rotary)
        out = self.proj_out(self.norm_out(hidden, temb))
        return (out.transpose(1, 2).reshape(rows, -1, frames, height, width),)

    def _of_kind(self, tokens: Tensor, kind: int) -> Tensor:
        kinds = torch.full(tokens.shape[:2], kind, dtype=torch.long, device=tokens.device)
        return tokens + self.cond_type_embed(kinds)
