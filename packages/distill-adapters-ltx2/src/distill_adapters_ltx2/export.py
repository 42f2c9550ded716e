"""One LTX-2 role where other tools can read it: a pipeline folder or a LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from distill_diffusers.export.exporter import ENCODER_FOLDERS, PipelineExporter
from distill_diffusers.sampling.scheduler import UniformGrid
from distill_protocols import ExportRequest, RoleSpec
from torch import Tensor, nn

from distill_adapters_ltx2.config import LTX2PipelineConfig
from distill_adapters_ltx2.kind import AUDIO_VAE, CONNECTORS


class Ltx2Exporter(PipelineExporter[LTX2PipelineConfig]):
    """``Exporter`` of the family, for ``LTX2Pipeline``."""

    components = ("vae", AUDIO_VAE, "vocoder", CONNECTORS, "processor", *ENCODER_FOLDERS)
    config_arguments = ("num_frames", "height", "width", "frame_rate", "max_sequence_length")
    grid = UniformGrid()

    def call_arguments(self, role: RoleSpec, request: ExportRequest) -> Mapping[str, object]:
        """Return arguments of ``LTX2Pipeline``: all its guidance, which is on by default."""
        config, w = self.config, request.sampler.guidance
        guided = w not in (0, 1)
        stg = config.stg_scale if guided else 0.0
        modality = config.modality_scale if guided else 1.0
        rescale = config.guidance_rescale if guided else 0.0
        audio_w = config.audio_guidance if guided and config.audio_guidance is not None else w
        return {
            **super().call_arguments(role, request),
            "audio_guidance_scale": audio_w,
            **{f"{of}stg_scale": stg for of in ("", "audio_")},
            **{f"{of}modality_scale": modality for of in ("", "audio_")},
            **{f"{of}guidance_rescale": rescale for of in ("", "audio_")},
            "spatio_temporal_guidance_blocks": list(config.stg_blocks),
        }

    def pipeline_notes(self, role: RoleSpec, request: ExportRequest) -> Iterator[str]:
        """Say what the pipeline does beside what was trained."""
        yield from super().pipeline_notes(role, request)
        if not self.config.audio:
            yield (
                "the role was trained without sound. LTX2Pipeline makes sound beside the pictures, "
                "which see it: its clips are the trainer's only where the transformer is called "
                "with isolate_modalities=True, and its sound is the base's own"
            )

    def probe(self, module: nn.Module, dtype: torch.dtype) -> Mapping[str, Any]:
        """Draw seeded inputs of four tokens of pictures, three of sound and eight of text, the last
        two masked."""
        config: Any = module.config
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(dtype)

        own = config.use_prompt_embeddings
        widths = [
            config.caption_channels if own else width
            for width in (config.cross_attention_dim, config.audio_cross_attention_dim)
        ]
        mask, time = (torch.arange(8) < 6)[None].float(), torch.tensor([640.0])
        return {
            "hidden_states": draw(1, 4, config.in_channels),
            "audio_hidden_states": draw(1, 3, config.audio_in_channels),
            "encoder_hidden_states": draw(1, 8, widths[0]),
            "audio_encoder_hidden_states": draw(1, 8, widths[1]),
            "timestep": time,
            "sigma": time,
            "encoder_attention_mask": mask,
            "audio_encoder_attention_mask": mask,
            "num_frames": 1,
            "height": 2,
            "width": 2,
            "audio_num_frames": 3,
        }
