"""One Wan role where other tools can read it: a pipeline folder, a ComfyUI file or a LoRA."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import asdict
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from distill_diffusers.export.exporter import PipelineExporter
from distill_diffusers.export.formats import (
    Comparisons,
    Export,
    ExportFormat,
    LoraNames,
    Written,
    write_single_files,
)
from distill_diffusers.sampling.scheduler import StockSchedule
from distill_protocols import ExportRecord, ExportRequest, RoleSpec, WeightSource
from torch import Tensor, nn

from distill_adapters_wan.config import WanPipelineConfig
from distill_adapters_wan.export.flow_map import FlowMapExporter
from distill_adapters_wan.images.shapes import CLIP_TOKENS, PAIR_TOKENS, image_kind, reads_pairs
from distill_adapters_wan.names.original import to_diffusers, to_original
from distill_adapters_wan.shape import TEXT_TOKENS

COMFY_CONSTANTS = {
    "attention_head_dim": 128,
    "freq_dim": 256,
    "patch_size": [1, 2, 2],
    "eps": 1e-6,
}
"""What ComfyUI assumes, as a weight file does not state it."""
PROBE_TEXT_TOKENS = 8
"""Of the inputs for verification, where the model does not fix the number of text tokens."""

_CAUSAL = (
    "this role makes a clip chunk by chunk (`causal`), and stock pipelines let all frames see all: "
    "their clips are not those that it was trained for. Sample it with WanAdapter.sample or .stream"
)


class WanExporter(PipelineExporter[WanPipelineConfig]):
    """``Exporter`` of the Wan family; beside the formats of ``PipelineExporter``:

    - ``comfyui``: ``<name>.safetensors`` (a second expert: ``<name>-transformer_2``) under the
      original Wan names without a prefix, which ComfyUI, its WanVideoWrapper and diffusers'
      ``from_single_file`` all read. ``<name>`` is the folder's.
    - ``lora`` has a second file, ``<name>-comfyui.safetensors``, under the names that ComfyUI
      reads.

    Args:
        family: ``PLUGIN``.
        config: the run's ``pipeline_config``.
        source: Diffusers folder or hub id that VAE, text encoder and tokenizer are copied from.
    """

    # The last two: of Wan 2.1 image-to-video alone.
    components = ("vae", "text_encoder", "tokenizer", "image_encoder", "image_processor")

    config_arguments = ("num_frames", "height", "width", "max_sequence_length")

    def export(
        self,
        role: RoleSpec,
        weights: Mapping[str, WeightSource],
        folder: Path,
        request: ExportRequest,
    ) -> ExportRecord:
        """See ``PipelineExporter.export``; a flow map becomes another pipeline's folder
        (``FlowMapExporter``)."""
        if role.target_time is not None:
            return self._flow_maps.export(role, weights, folder, request)
        return super().export(role, weights, folder, request)

    def verify(
        self,
        role: RoleSpec,
        weights: Mapping[str, WeightSource],
        folder: Path,
        request: ExportRequest,
    ) -> ExportRecord:
        """See ``PipelineExporter.verify``."""
        if role.target_time is not None:
            return self._flow_maps.verify(role, weights, folder, request)
        return super().verify(role, weights, folder, request)

    def warnings(self, role: RoleSpec, request: ExportRequest) -> Iterator[str]:
        """See ``PipelineExporter.warnings``."""
        if role.target_time is None:
            yield from super().warnings(role, request)

    @property
    def _flow_maps(self) -> FlowMapExporter:
        return FlowMapExporter(self.family, self.config, source=self.source)

    def call_arguments(self, role: RoleSpec, request: ExportRequest) -> Mapping[str, object]:
        """Return arguments of ``WanPipeline.__call__``; those of two experts have two guidances."""
        call = super().call_arguments(role, request)
        low = request.sampler.guidance_2
        return call if low is None else {**call, "guidance_scale_2": low}

    def record_entries(self, role: RoleSpec) -> Mapping[str, object]:
        """Return how the role is causal."""
        causal = self.config.causal
        is_causal = causal is not None and role.name in causal.roles
        return {"causal": asdict(causal) if causal is not None and is_causal else None}

    def index_entries(
        self, own_index: Mapping[str, object], modules: Collection[str]
    ) -> Mapping[str, object]:
        """Return which pipeline it is, which expert is called when, and how t is given."""
        names = ("_class_name", "boundary_ratio", "expand_timesteps")
        entries = {name: own_index[name] for name in names if name in own_index}
        if len(modules) > 1 and self.config.boundary_ratio is not None:
            entries["boundary_ratio"] = self.config.boundary_ratio
        return entries

    def formats(self) -> Mapping[str, ExportFormat]:
        """Add ``comfyui``."""
        comfyui = ExportFormat(write=_write_comfyui, verify=self._verify_comfyui)
        return {**super().formats(), "comfyui": comfyui}

    def lora_files(self, export: Export, module: str) -> Mapping[str, LoraNames]:
        """Add the file that ComfyUI reads."""
        comfyui = f"{export.name}-comfyui{export.suffix(module)}.safetensors"
        return {**super().lora_files(export, module), comfyui: COMFY_LORA}

    def probe(self, module: nn.Module, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Draw seeded inputs of four tokens."""
        transformer: Any = module
        config = transformer.config
        generator = torch.Generator().manual_seed(0)
        frames, height, width = config.patch_size
        size = (1, config.in_channels, frames, 2 * height, 2 * width)
        tokens = PROBE_TEXT_TOKENS if config.image_dim is None else TEXT_TOKENS
        latents = torch.randn(size, generator=generator)
        text = torch.randn(1, tokens, config.text_dim, generator=generator)
        probe = {
            "hidden_states": latents.to(dtype),
            "timestep": torch.tensor([640.0]),
            "encoder_hidden_states": text.to(dtype),
        }
        if config.image_dim is not None:
            pair = reads_pairs(config)
            tokens = config[PAIR_TOKENS] // 2 if pair else CLIP_TOKENS
            image = torch.randn(1 + pair, tokens, config.image_dim, generator=generator)
            probe["encoder_hidden_states_image"] = image.to(dtype)
        return probe

    # -- notes --------------------------------------------------------------------------------

    def notes(
        self, role: RoleSpec, request: ExportRequest, schedule: StockSchedule
    ) -> Iterator[str]:
        """Add that stock pipelines do not sample a causal role."""
        yield from super().notes(role, request, schedule)
        if self.record_entries(role)["causal"] is not None:
            yield _CAUSAL

    def sampler_notes(
        self, role: RoleSpec, request: ExportRequest, schedule: StockSchedule
    ) -> Iterator[str]:
        """Say of a ComfyUI file that samplers are ComfyUI's."""
        if request.format != "comfyui":
            yield from super().sampler_notes(role, request, schedule)
            return
        yield (
            "ComfyUI has samplers of its own: `timesteps` (t = 1000 sigma) and `sampler` say what "
            "the role was made for"
        )

    def pipeline_notes(self, role: RoleSpec, request: ExportRequest) -> Iterator[str]:
        """Say what WanPipeline does with guidance, and how a first frame is passed."""
        yield from super().pipeline_notes(role, request)
        high, low = request.sampler.guidances
        if high <= 1 and low != high:
            yield (
                f"WanPipeline guides neither expert where guidance_scale is at most 1, so "
                f"guidance_scale_2 {low:g} has no effect in it, and it cannot repeat this sampler"
            )
        model = self.family.describe(role.path)
        kind = image_kind(model.main, model.call_options["expand_timesteps"])
        if kind == "channels":
            last = ", and the last one as `last_image`" if reads_pairs(model.main) else ""
            yield f"pass the first frame as `image`, of the clip's size{last}"
        elif kind == "frame" and request.format == "diffusers":
            yield (
                "the folder is WanPipeline's (text); WanImageToVideoPipeline.from_pretrained"
                "(folder) takes a first frame as `image`, and no further ones"
            )

    # -- ComfyUI ------------------------------------------------------------------------------

    def _verify_comfyui(self, export: Export, folder: Path) -> Comparisons:
        from distill_diffusers.export.verification import verify_single_files

        def by_diffusers(names: Iterable[str]) -> Iterable[str]:
            return convert_wan_transformer_to_diffusers(dict.fromkeys(names))

        def by_table(names: Iterable[str]) -> Iterable[str]:
            return map(to_diffusers, names)

        return verify_single_files(
            self, export, folder, to_original, to_diffusers=(by_diffusers, by_table)
        )


def _write_comfyui(export: Export, stage: Path) -> Written:
    write_single_files(export, stage, to_original)
    notes = [note for module in export.modules.values() for note in _comfy_notes(module)]
    return Written(notes=tuple(notes))


def _comfy_notes(module: nn.Module) -> Iterator[str]:
    transformer: Any = module
    for key, constant in COMFY_CONSTANTS.items():
        value = transformer.config[key]
        value = list(value) if isinstance(value, (list, tuple)) else value
        if value != constant:
            yield (
                f"this model's {key} is {value}; ComfyUI takes {constant} for granted and will "
                "call it wrongly (diffusers' from_single_file with a config does not)"
            )


def _comfy_name(name: str) -> str:
    return f"diffusion_model.{to_original(name)}"


def _comfy_difference(name: str) -> str:
    # A parameter that is no layer's weight or bias, such as a modulation, has no end to cut off.
    original = _comfy_name(name)
    if original.endswith(".bias"):
        return f"{original.removesuffix('.bias')}.diff_b"
    return f"{original.removesuffix('.weight')}.diff"


COMFY_LORA = LoraNames(
    factor=lambda layer, side: (
        f"{_comfy_name(f'{layer}.weight').removesuffix('.weight')}.lora_{side}.weight"
    ),
    bias=lambda layer: _comfy_difference(f"{layer}.bias"),
    difference=_comfy_difference,
)
"""As ComfyUI, WanVideoWrapper and musubi-tuner's converter name them. diffusers' converter takes
the biases of linear layers and drops the other differences."""
