"""One Qwen-Image role where other tools can read it: a pipeline folder, a LoRA, a ComfyUI file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from distill_diffusers.export.exporter import PipelineExporter
from distill_diffusers.export.formats import ExportFormat
from distill_diffusers.sampling.scheduler import UniformGrid
from distill_protocols import ExportRequest, RoleSpec
from torch import Tensor, nn

from distill_adapters_qwen_image.config import QwenImageConfig


class QwenImageExporter(PipelineExporter[QwenImageConfig]):
    """``Exporter`` of the family, for ``QwenImagePipeline``; beside ``diffusers`` and ``lora``:

    - ``comfyui``: ``<name>.safetensors``. ComfyUI's Qwen-Image has diffusers' own names
      (Comfy-Org/ComfyUI, comfy/ldm/qwen_image/model.py), and reads the LoRA file as it is
      (comfy/lora.py, prefix ``transformer.``).
    """

    config_arguments = ("height", "width", "max_sequence_length")
    grid = UniformGrid()

    def call_arguments(self, role: RoleSpec, request: ExportRequest) -> Mapping[str, object]:
        """Return arguments of ``QwenImagePipeline.__call__``, whose ``guidance_scale`` is that of
        models that read guidance as an input."""
        call = dict(super().call_arguments(role, request))
        return {**call, "true_cfg_scale": call.pop("guidance_scale")}

    def formats(self) -> Mapping[str, ExportFormat]:
        """Add ``comfyui``."""
        return {**super().formats(), "comfyui": self.file_of_own_names()}

    def probe(self, module: nn.Module, dtype: torch.dtype) -> Mapping[str, Any]:
        """Draw seeded inputs of four tokens and eight of text, the last two masked."""
        config: Any = module.config
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(1, *size, generator=generator).to(dtype)

        return {
            "hidden_states": draw(4, config.in_channels),
            "timestep": torch.tensor([0.64]),
            "encoder_hidden_states": draw(8, config.joint_attention_dim),
            "encoder_hidden_states_mask": (torch.arange(8) < 6)[None],
            "img_shapes": [[(1, 2, 2)]],
        }

    def pipeline_notes(self, role: RoleSpec, request: ExportRequest) -> Iterator[str]:
        """Say what QwenImagePipeline does with guidance."""
        w = request.sampler.guidance
        if w < 1:
            yield (
                f"QwenImagePipeline treats true_cfg_scale {w:g} as 1 (it guides only above 1), so "
                "it cannot repeat this sampler"
            )
        if w > 1:
            yield (
                "pass the run's negative prompt, an empty one too: QwenImagePipeline does not "
                "guide without"
            )
