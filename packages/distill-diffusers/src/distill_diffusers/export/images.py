"""The exporter that an image model on diffusers inherits from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from attrs import asdict
from distill_protocols import ExportRequest, RoleSpec

from distill_diffusers.config import ImageConfig
from distill_diffusers.export.exporter import PipelineExporter
from distill_diffusers.family import DiffusersFamily
from distill_diffusers.kinds import class_name


class ImageExporter(PipelineExporter):
    """``Exporter`` of an image family whose pipeline guides where ``guidance_scale`` is above 1.

    Args:
        family: its plugin.
        config: the run's ``pipeline_config``, of a subclass of ``ImageConfig``.
        source: Diffusers folder or hub id that VAE, encoders and tokenizers are copied from.
    """

    config_arguments: ClassVar[tuple[str, ...]] = ("height", "width")
    """Keys of ``config`` that the pipeline takes under the same names."""

    def __init__(self, family: DiffusersFamily[Any], config: ImageConfig, *, source: str) -> None:
        super().__init__(family, source=source)
        self.config = config
        self.source = source

    def call_arguments(self, role: RoleSpec, request: ExportRequest) -> Mapping[str, Any]:
        """Return steps, guidance and ``config_arguments``."""
        config = asdict(self.config)
        return {
            "num_inference_steps": request.sampler.steps,
            "guidance_scale": request.sampler.guidance,
            **{name: config[name] for name in self.config_arguments},
        }

    def pipeline_notes(self, role: RoleSpec, request: ExportRequest) -> Iterator[str]:
        """Say what the pipeline does with guidance."""
        pipeline, w = class_name(self.kind.pipelines[0]), request.sampler.guidance
        if w < 1:
            yield (
                f"{pipeline} treats guidance_scale {w:g} as 1 (it guides only above 1), so it "
                "cannot repeat this sampler"
            )
        if w > 1:
            yield f"pass the run's negative prompt; {pipeline}'s own default is the empty one"
