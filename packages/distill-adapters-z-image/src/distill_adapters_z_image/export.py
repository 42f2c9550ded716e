"""One Z-Image role where other tools can read it: a pipeline folder, a LoRA, a ComfyUI file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from distill_diffusers.export.exporter import PipelineExporter
from distill_diffusers.export.formats import ExportFormat
from distill_diffusers.sampling.scheduler import UniformGrid
from distill_protocols import ExportRequest, RoleSpec
from torch import Tensor, nn

from distill_adapters_z_image.config import ZImageConfig


class ZImageExporter(PipelineExporter[ZImageConfig]):
    """``Exporter`` of the family, for ``ZImagePipeline``; beside ``diffusers`` and ``lora``:

    - ``comfyui``: ``<name>.safetensors`` under diffusers' own names. ComfyUI knows Z-Image by them,
      and joins query, key and value itself (Comfy-Org/ComfyUI, comfy/model_detection.py,
      ``convert_diffusers_mmdit``). It reads the LoRA file as it is (comfy/lora.py, where Lumina2
      has these names too).
    """

    config_arguments = (
        *("height", "width", "max_sequence_length"),
        *("cfg_normalization", "cfg_truncation"),
    )
    grid = UniformGrid()

    def call_arguments(self, role: RoleSpec, request: ExportRequest) -> Mapping[str, object]:
        """Return arguments of ``ZImagePipeline.__call__``, whose guidance is c + g (c - u)."""
        call = super().call_arguments(role, request)
        return {**call, "guidance_scale": request.sampler.guidance - 1}

    def formats(self) -> Mapping[str, ExportFormat]:
        """Add ``comfyui``."""
        return {**super().formats(), "comfyui": self.file_of_own_names()}

    def probe(self, module: nn.Module, dtype: torch.dtype) -> Mapping[str, Any]:
        """Draw seeded inputs of a picture of four tokens and a text of eight."""
        config: Any = module.config
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(dtype)

        return {
            "x": [draw(config.in_channels, 1, 4, 4)],
            "t": torch.tensor([0.36]),
            "cap_feats": [draw(8, config.cap_feat_dim)],
        }

    def pipeline_notes(self, role: RoleSpec, request: ExportRequest) -> Iterator[str]:
        """Say what ZImagePipeline does with guidance."""
        w = request.sampler.guidance
        yield f"ZImagePipeline's guidance_scale g is c + g (c - u): {w - 1:g} for guidance {w:g}"
        if w < 1:
            yield "it guides only above 0, so it cannot repeat this sampler"
        if w > 1:
            yield "pass the run's negative prompt; ZImagePipeline's own default is the empty one"
