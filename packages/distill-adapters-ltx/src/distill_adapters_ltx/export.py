"""One LTX role where other tools can read it: a pipeline folder or a LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from distill_diffusers.export.exporter import PipelineExporter
from distill_diffusers.family import DiffusersFamily
from distill_diffusers.sampling.scheduler import UniformGrid
from distill_protocols import ExportRequest, RoleSpec
from torch import Tensor, nn

from distill_adapters_ltx.arithmetic import token_positions
from distill_adapters_ltx.config import LTXPipelineConfig


class LtxExporter(PipelineExporter):
    """``Exporter`` of the LTX family, for ``LTXPipeline``.

    Args:
        family: ``PLUGIN``.
        config: the run's ``pipeline_config``.
        source: Diffusers folder or hub id that VAE, text encoder and tokenizer are copied from.
    """

    def __init__(
        self, family: DiffusersFamily[LTXPipelineConfig], config: LTXPipelineConfig, *, source: str
    ) -> None:
        super().__init__(family, source=source, grid=UniformGrid())
        self._config = config

    def call_arguments(self, role: RoleSpec, request: ExportRequest) -> Mapping[str, Any]:
        """Return arguments of ``LTXPipeline.__call__``."""
        config = self._config
        return {
            "num_inference_steps": request.sampler.steps,
            "guidance_scale": request.sampler.guidance,
            "guidance_rescale": config.guidance_rescale,
            "num_frames": config.num_frames,
            "height": config.height,
            "width": config.width,
            "frame_rate": config.frame_rate,
            "max_sequence_length": config.max_sequence_length,
            "decode_timestep": config.decode_timestep,
            "decode_noise_scale": config.decode_noise_scale,
        }

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

    def pipeline_notes(self, role: RoleSpec, request: ExportRequest) -> Iterator[str]:
        """Say what LTXPipeline does with guidance."""
        guidance = request.sampler.guidance
        if guidance < 1:
            yield (
                f"LTXPipeline treats guidance_scale {guidance:g} as 1 (it guides only above 1), "
                "so it cannot repeat this sampler"
            )
        if guidance > 1:
            yield "pass the run's negative prompt; LTXPipeline's own default is the empty one"
