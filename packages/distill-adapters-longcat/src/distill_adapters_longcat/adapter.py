"""How LongCat-Video is called from text.

What is true of any flow-matching model is in ``distill_diffusers.adapter``.

Letters: B batch, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

from distill_diffusers.adapter import device_of
from distill_diffusers.calls import flow
from distill_diffusers.components.statistics import LatentStatistics
from distill_diffusers.components.umt5 import clean_prompts, umt5_encoders
from distill_diffusers.family import DiffusersFamily
from distill_diffusers.family_adapter import FamilyAdapter
from distill_protocols import Condition, ModelBundle
from torch import Tensor

from distill_adapters_longcat.config import LongCatPipelineConfig
from distill_adapters_longcat.kind import TEXT, TEXT_MASK


class LongCatAdapter(FamilyAdapter):
    """``DistillAdapter`` of LongCat-Video; a condition is ``text`` [B, L, D] and ``text_mask``
    [B, L].

    Args:
        bundle: roles, each with a module ``dit`` or, of a discriminator, ``heads``.
        family: ``PLUGIN``.
        config: the run's ``pipeline_config``.
        source: folder or hub id of VAE, text encoder and tokenizer.

    Raises:
        WeightsError: the VAE of ``source`` is missing or damaged, or does not fit a role.
    """

    blocks = "blocks"
    pipeline_batches_guidance = True

    def __init__(
        self,
        bundle: ModelBundle,
        family: DiffusersFamily[LongCatPipelineConfig],
        config: LongCatPipelineConfig,
        *,
        source: str,
    ) -> None:
        self._config = config
        self._text = umt5_encoders(
            source,
            length=config.max_sequence_length,
            precision=config.text_encoder_precision,
            device=device_of(bundle),
        )
        super().__init__(
            bundle,
            family,
            config,
            source=source,
            statistics=LatentStatistics.of_config(source),
            encoders=self._text,
        )

    def combine_guidance(
        self, cond: Tensor, uncond: Tensor, w: float, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """Guide from the unconditional prediction as CFG-zero scales it."""
        return super().combine_guidance(cond, scale_to(uncond, cond), w, x_t, t)

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """Compute z / (1 / std) + mean per channel, which rounds as the original does."""
        wide = flow.widen(latents)
        return wide / (1.0 / self._statistics.std.to(wide)) + self._statistics.mean.to(wide)

    def encode_condition(self, raw_cond: Sequence[str]) -> Condition:
        """Encode prompts as the original does: UMT5 does not attend to the padding, and the
        transformer hides it (``text_tokens_zero_pad``)."""
        length = self._config.max_sequence_length
        text, mask = self._text.embed(clean_prompts(raw_cond), length, attend_padding=False)
        return Condition({TEXT: text, TEXT_MASK: mask})


def scale_to(uncond: Tensor, cond: Tensor) -> Tensor:
    """Scale the unconditional velocity, a sample at a time, to be nearest to the conditional one:
    ``s u`` with ``s = c.u / (u.u + 1e-8)`` (CFG-Zero*, Fan et al. 2025, arXiv 2503.18886).

    Args:
        uncond, cond: u and c [B, ...], fp32.
    """
    u, c = uncond.flatten(1), cond.flatten(1)
    scale = (c * u).sum(dim=1) / (u.square().sum(dim=1) + 1e-8)
    return uncond * scale.view(-1, *[1] * (uncond.dim() - 1))
