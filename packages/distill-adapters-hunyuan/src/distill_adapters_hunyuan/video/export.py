"""One HunyuanVideo role where other tools can read it: a pipeline folder or a LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from distill_diffusers.export.exporter import PipelineExporter
from distill_diffusers.sampling.scheduler import UniformGrid
from distill_protocols import ExportRequest, RoleSpec
from torch import Tensor, nn

from distill_adapters_hunyuan.video.config import HunyuanVideoConfig


class HunyuanVideoExporter(PipelineExporter[HunyuanVideoConfig]):
    """``Exporter`` of HunyuanVideo, for ``HunyuanVideoPipeline``."""

    config_arguments = ("num_frames", "height", "width", "max_sequence_length")
    grid = UniformGrid()

    def call_arguments(self, role: RoleSpec, request: ExportRequest) -> Mapping[str, object]:
        """Return arguments of ``HunyuanVideoPipeline.__call__``; without guidance the transformer
        still reads the config's ``embedded_guidance``."""
        w = request.sampler.guidance
        scale = self.config.embedded_guidance if w == 1 else w
        return {**super().call_arguments(role, request), "guidance_scale": scale}

    def probe(self, module: nn.Module, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Draw seeded inputs of four tokens and eight of text, the last two masked."""
        transformer: Any = module
        config = transformer.config
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(1, *size, generator=generator).to(dtype)

        side = 2 * config.patch_size
        return {
            "hidden_states": draw(config.in_channels, config.patch_size_t, side, side),
            "timestep": torch.tensor([640.0]),
            "encoder_hidden_states": draw(8, config.text_embed_dim),
            "encoder_attention_mask": (torch.arange(8) < 6)[None].to(dtype),
            "pooled_projections": draw(config.pooled_projection_dim),
            "guidance": torch.tensor([6000.0], dtype=dtype),
        }

    def pipeline_notes(self, role: RoleSpec, request: ExportRequest) -> Iterator[str]:
        """Say that guidance is an input, and that there is none of two calls."""
        yield (
            "the transformer reads guidance_scale as an input (no second call, no negative "
            "prompt); leave true_cfg_scale at 1"
        )
        if request.sampler.guidance == 0:
            yield (
                "guidance 0 is the negative prompt alone, which HunyuanVideoPipeline cannot "
                "repeat: pass that prompt in the other's place"
            )
