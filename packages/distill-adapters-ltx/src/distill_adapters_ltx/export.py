"""One LTX role where other tools can read it: a pipeline folder or a LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from distill_diffusers.export.exporter import PipelineExporter
from distill_diffusers.sampling.scheduler import GivenTimes, StepGrid, UniformGrid
from distill_protocols import ExportRequest, RoleSpec, SamplerSpec
from torch import Tensor, nn

from distill_adapters_ltx.adapter import token_positions
from distill_adapters_ltx.config import LTXPipelineConfig
from distill_adapters_ltx.kind import CONDITION, PIPELINE


class LtxExporter(PipelineExporter[LTXPipelineConfig]):
    """``Exporter`` of the LTX family, for the pipeline that the role's model is of."""

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

    def grid_of(self, role: RoleSpec, sampler: SamplerSpec) -> StepGrid:
        """Return the sampler's own times for ``LTXConditionPipeline``, whose call takes them."""
        if self._takes_times(role) and sampler.solver == "euler":
            return GivenTimes(sampler.sigmas())
        return self.grid

    def call_arguments(self, role: RoleSpec, request: ExportRequest) -> Mapping[str, object]:
        """Return arguments of the pipeline; of ``LTXConditionPipeline`` its times too, and that no
        noise is put on given frames."""
        call = super().call_arguments(role, request)
        if not self._takes_times(role):
            return call
        times = GivenTimes(request.sampler.sigmas()).timesteps
        return {**call, "timesteps": times, "image_cond_noise_scale": 0.0}

    def pipeline_notes(self, role: RoleSpec, request: ExportRequest) -> Iterator[str]:
        """Say how given frames are passed, and what the pipeline cannot sample."""
        yield from super().pipeline_notes(role, request)
        if not self._takes_times(role):
            if request.format == "diffusers":
                yield (
                    "the folder is LTXPipeline's (text); LTXImageToVideoPipeline.from_pretrained"
                    "(folder) takes a first frame as `image`, and draws its latents from the "
                    "VAE's posterior, of which the trainer takes the mean"
                )
            return
        yield (
            "pass first frames as `image` or `video`, a last frame with `frame_index` num_frames - "
            "1; LTXConditionPipeline draws their latents from the VAE's posterior, of which the "
            "trainer takes the mean"
        )
        if request.sampler.stochastic:
            yield (
                "LTXConditionPipeline gives its scheduler -v, by which stochastic sampling goes "
                "wrong in diffusers: it cannot repeat this sampler"
            )
        if request.sampler.solver != "euler":
            yield (
                f"LTXConditionPipeline steps by FlowMatchEulerDiscreteScheduler alone, and not by "
                f"{request.sampler.solver}: it cannot repeat this sampler"
            )

    def _takes_times(self, role: RoleSpec) -> bool:
        return self.family.describe(role.path).call_options[PIPELINE] == CONDITION

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
