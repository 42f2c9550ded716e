"""Export of a flow map of Wan as diffusers' AnyFlow pipeline, which is told both times of a step.

Its transformer is Wan's with a second time embedder, under the names that ours has (diffusers
0.42.1, ``models/transformers/transformer_anyflow.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from distill_diffusers.export.exporter import PipelineExporter
from distill_diffusers.export.formats import Export
from distill_diffusers.kinds import TARGET_GATE, class_name
from distill_diffusers.sampling.scheduler import (
    GivenTimes,
    SchedulerGrid,
    StepGrid,
    StockSchedule,
    flow_map_schedule,
)
from distill_protocols import ExportRequest, RoleSpec, SamplerSpec
from torch import Tensor, nn

from distill_adapters_wan.config import WanPipelineConfig
from distill_adapters_wan.kind import WAN

ANYFLOW = evolve(
    WAN,
    transformer="diffusers.models.transformers.transformer_anyflow:AnyFlowTransformer3DModel",
    pipelines=("diffusers.pipelines.anyflow.pipeline_anyflow:AnyFlowPipeline",),
    modules=WAN.modules[:1],
    call_options={},
    target_embedder="",  # the class has one by itself
)
PROBE_TEXT_TOKENS = 8
_CONFIG = (
    "patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels",
    "text_dim", "freq_dim", "ffn_dim", "num_layers", "cross_attn_norm", "eps", "rope_max_seq_len",
)  # fmt: skip
_INDEX = ("text_encoder", "tokenizer", "transformer", "vae", "scheduler")


class FlowMapExporter(PipelineExporter[WanPipelineConfig]):
    """``Exporter`` of Wan roles with ``target_time``: ``diffusers`` alone, a folder of
    ``AnyFlowPipeline`` with ``FlowMapEulerDiscreteScheduler``.

    Args:
        family: ``PLUGIN``.
        config: the run's ``pipeline_config``.
        source: Diffusers folder or hub id that VAE, text encoder and tokenizer are copied from.
    """

    components = ("vae", "text_encoder", "tokenizer")
    config_arguments = ("num_frames", "height", "width", "max_sequence_length")

    def __init__(self, family: Any, config: WanPipelineConfig, *, source: str) -> None:
        super().__init__(family, config, source=source)
        self.kind = ANYFLOW

    def transformer_configs(self, role: RoleSpec) -> Mapping[str, Mapping[str, object]]:
        """Return configurations of ``AnyFlowTransformer3DModel``."""
        configs = self.family.describe_role(role).transformers
        return {
            name: {
                **{key: config[key] for key in _CONFIG if key in config},
                "gate_value": config[TARGET_GATE],
                "deltatime_type": "r",
            }
            for name, config in configs.items()
        }

    def schedule_of(self, role: RoleSpec, sampler: SamplerSpec) -> StockSchedule:
        """Return the scheduler of flow maps."""
        return flow_map_schedule(sampler)

    def grid_of(self, role: RoleSpec, sampler: SamplerSpec) -> StepGrid:
        """Return the scheduler's own grid, or the times that the pipeline's call is given."""
        return SchedulerGrid() if sampler.timesteps is None else GivenTimes(sampler.sigmas())

    def call_arguments(self, role: RoleSpec, request: ExportRequest) -> Mapping[str, object]:
        """Return arguments of ``AnyFlowPipeline.__call__``."""
        call = super().call_arguments(role, request)
        if request.sampler.timesteps is None:
            return call
        return {**call, "timesteps": [1000 * sigma for sigma in request.sampler.sigmas()]}

    def model_index(self, export: Export, source: Path, stage: Path) -> dict[str, object]:
        """Leave of Wan's index what the pipeline takes."""
        index = super().model_index(export, source, stage)
        kept = {key: index[key] for key in (*_INDEX, "_diffusers_version") if key in index}
        return {"_class_name": class_name(ANYFLOW.pipelines[0]), **kept}

    def index_entries(
        self, own_index: Mapping[str, object], modules: Collection[str]
    ) -> Mapping[str, object]:
        """Return nothing of Wan's own."""
        return {}

    def probe(self, module: nn.Module, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Draw seeded inputs of four tokens."""
        transformer: Any = module
        config = transformer.config
        generator = torch.Generator().manual_seed(0)
        frames, height, width = config.patch_size
        size = (1, frames, config.in_channels, 2 * height, 2 * width)
        latents = torch.randn(size, generator=generator)
        text = torch.randn(1, PROBE_TEXT_TOKENS, config.text_dim, generator=generator)
        return {
            "hidden_states": latents.to(dtype),
            "timestep": torch.full((1, frames), 640.0),
            "r_timestep": torch.full((1, frames), 310.0),
            "encoder_hidden_states": text.to(dtype),
        }
