"""How a Stable Diffusion 3 model is called."""

from __future__ import annotations

from collections.abc import Sequence

from distill_diffusers.adapter import device_of
from distill_diffusers.calls.precision import call_in_precision
from distill_diffusers.components.encoders import TextEncoders, numbered_parts
from distill_diffusers.family import DiffusersFamily
from distill_diffusers.images import ImageAdapter
from distill_protocols import Condition, ModelBundle, RoleHandle
from torch import Tensor

from distill_family_sd3.config import SD3PipelineConfig
from distill_family_sd3.models import SD3, TEXT_ENCODERS
from distill_family_sd3.text import encode_prompts


class SD3Adapter(ImageAdapter):
    """``DistillAdapter`` of SD 3. A condition is text [B, L, D] and pooled [B, P]."""

    pipeline_batches_guidance = True
    block_output = 1  # joint blocks return text first

    def __init__(
        self,
        bundle: ModelBundle,
        family: DiffusersFamily[SD3PipelineConfig],
        config: SD3PipelineConfig,
        *,
        source: str,
    ) -> None:
        self._text = TextEncoders(
            source,
            numbered_parts(source, TEXT_ENCODERS),
            settings=family.text_settings(config),
            device=device_of(bundle),
        )
        super().__init__(bundle, family, config, source=source, encoders=self._text)

    def encode_condition(self, raw_cond: Sequence[str]) -> Condition:
        return Condition(encode_prompts(self._text, raw_cond, *self.condition_rows["text"]))


def call_transformer(
    role: RoleHandle, latents: Tensor, t: Tensor, text: Tensor, pooled: Tensor
) -> Tensor:
    """Return v of x_t, both [B, C, 1, H, W], in the precision of the call; t is never rounded."""
    with call_in_precision(role, "transformer", SD3, latents.device) as dtype:
        (v,) = role.modules["transformer"](
            hidden_states=latents.squeeze(2).to(dtype),
            encoder_hidden_states=text.to(dtype),
            pooled_projections=pooled.to(dtype),
            timestep=t.float(),
            return_dict=False,
        )
    return v.unsqueeze(2)
