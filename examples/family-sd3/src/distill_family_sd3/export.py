"""A role where ``StableDiffusion3Pipeline`` can read it: a pipeline folder or a LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from distill_diffusers.components.encoders import numbered_parts
from distill_diffusers.export.exporter import PipelineExporter
from distill_protocols import ExportRequest, RoleSpec
from torch import Tensor, nn

from distill_family_sd3.config import SD3PipelineConfig
from distill_family_sd3.models import TEXT_ENCODERS


class SD3Exporter(PipelineExporter[SD3PipelineConfig]):
    """``Exporter`` of the family."""

    config_arguments = ("height", "width", "max_sequence_length")

    def probe(self, module: nn.Module, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Draw seeded inputs of four tokens."""
        config: Any = module.config
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(1, *size, generator=generator).to(dtype)

        side = 2 * config.patch_size
        return {
            "hidden_states": draw(config.in_channels, side, side),
            "encoder_hidden_states": draw(8, config.joint_attention_dim),
            "pooled_projections": draw(config.pooled_projection_dim),
            "timestep": torch.tensor([640.0]),
        }

    def pipeline_notes(self, role: RoleSpec, request: ExportRequest) -> Iterator[str]:
        yield from super().pipeline_notes(role, request)
        if len(numbered_parts(self.source, TEXT_ENCODERS)) < len(TEXT_ENCODERS):
            yield "load the pipeline with text_encoder_3=None, tokenizer_3=None: there is no T5"
