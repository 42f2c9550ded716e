"""One LTX role where other tools can read it: a pipeline folder or a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from distill_diffusers.export.exporter import PipelineExporter
from distill_diffusers.sampling.scheduler import UniformGrid
from torch import Tensor, nn

from distill_adapters_ltx.adapter import token_positions
from distill_adapters_ltx.config import LTXPipelineConfig


class LtxExporter(PipelineExporter[LTXPipelineConfig]):
    """``Exporter`` of the LTX family, for ``LTXPipeline``."""

    config_arguments = (
        "guidance_rescale",
        "num_frames",
        "height",
        "width",
        "frame_rate",
        "max_sequence_length",
        "decode_timestep",
        "decode_noise_scale",
    )
    grid = UniformGrid()

    def probe(self, module: nn.Module, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Draw seeded inputs of four tokens and eight of text, the last two masked."""
        transformer: Any = module
        channels, width = (transformer.config[n] for n in ("in_channels", "caption_channels"))
        generator = torch.Generator().manual_seed(0)
        device = torch.device("cpu")
        return {
            "hidden_states": torch.randn(1, 4, channels, generator=generator).to(dtype),
            "timestep": torch.tensor([640.0]),
            "encoder_hidden_states": torch.randn(1, 8, width, generator=generator).to(dtype),
            "encoder_attention_mask": (torch.arange(8) < 6)[None],
            "video_coords": token_positions((1, 2, 2), 25, device=device),
        }
