"""The family as an app sees it before torch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from attrs import evolve
from distill_diffusers.descriptions import LatentInfo, ModelDescription
from distill_diffusers.family import DiffusersFamily
from distill_diffusers.fingerprints import text_settings
from distill_diffusers.model_configs import read_integer
from distill_protocols import CaptionTokens

from distill_adapters_qwen_image.config import QwenImageConfig
from distill_adapters_qwen_image.kind import (
    QWEN_IMAGE,
    TEXT,
    TEXT_MASK,
    clip_problems,
    latent_info,
    unsupported,
)
from distill_adapters_qwen_image.published import PATCH, PUBLISHED, TEXT_WIDTH

if TYPE_CHECKING:
    from distill_protocols import DistillAdapter, Exporter, ModelBundle, RoleHandle
    from torch import Tensor


class QwenImageFamily(DiffusersFamily[QwenImageConfig]):
    """Qwen-Image from text, as ``QwenImagePipeline`` calls it. A picture is a clip of one frame."""

    name = "qwen_image"
    contract = 2
    help = "Qwen-Image and Qwen-Image-2512, from Diffusers-format folders or hub ids"
    config_class = QwenImageConfig
    kind = QWEN_IMAGE
    published = PUBLISHED

    def unsupported(self, model: ModelDescription, config: QwenImageConfig) -> Iterator[str]:
        return unsupported(model)

    def clip_problems(
        self, config: QwenImageConfig, latents: LatentInfo, transformer: Mapping[str, object]
    ) -> Iterator[str]:
        return clip_problems(latents, transformer)

    def latent_info(self, vae: Mapping[str, object]) -> LatentInfo:
        return latent_info(vae)

    def latent_tokens(self, config: QwenImageConfig, *, source: str) -> int | None:
        """Count tokens of 2 x 2 latent cells."""
        shape = self.latent_shape(config, source=source)
        return None if shape is None else (shape[2] // PATCH) * (shape[3] // PATCH)

    def condition_rows(
        self, transformer: Mapping[str, object], config: QwenImageConfig
    ) -> Mapping[str, tuple[int, ...]]:
        """Give ``text`` [L, D] and ``text_mask`` [L]."""
        length = config.max_sequence_length
        width = read_integer(transformer, "joint_attention_dim", TEXT_WIDTH)
        return {TEXT: (length, width), TEXT_MASK: (length,)}

    def text_settings(self, config: QwenImageConfig) -> Mapping[str, object]:
        return text_settings(config.max_sequence_length, config.text_encoder_precision)

    def count_tokens(
        self, config: QwenImageConfig, captions: Sequence[str], *, source: str
    ) -> CaptionTokens | None:
        """Count tokens of the prompts that are made of ``captions``, without what is dropped."""
        from distill_adapters_qwen_image.text import PREFIX_TOKENS, PROMPT

        prompts = [PROMPT.format(caption) for caption in captions]
        counted = super().count_tokens(config, prompts, source=source)
        return counted and evolve(counted, counts=tuple(n - PREFIX_TOKENS for n in counted.counts))

    def export_formats(self) -> Mapping[str, str]:
        return {**super().export_formats(), "comfyui": "one file under the names that ComfyUI has"}

    def call_model(self, role: RoleHandle, inputs: Mapping[str, Tensor]) -> Tensor:
        from distill_adapters_qwen_image.adapter import call_transformer

        return call_transformer(role, inputs)

    def adapter(
        self, bundle: ModelBundle, config: QwenImageConfig, *, source: str
    ) -> DistillAdapter:
        from distill_adapters_qwen_image.adapter import QwenImageAdapter

        return QwenImageAdapter(bundle, self, config, source=source)

    def exporter(self, config: QwenImageConfig, *, source: str) -> Exporter:
        from distill_adapters_qwen_image.export import QwenImageExporter

        return QwenImageExporter(self, config, source=source)


PLUGIN = QwenImageFamily()
