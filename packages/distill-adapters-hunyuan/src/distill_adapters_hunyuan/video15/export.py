"""One HunyuanVideo 1.5 role where other tools can read it: a pipeline folder or a LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
from diffusers.pipelines.hunyuan_video1_5.image_processor import generate_crop_size_list
from distill_diffusers.export.exporter import PipelineExporter
from distill_diffusers.sampling.scheduler import UniformGrid
from distill_protocols import ExportRequest, RoleSpec
from torch import Tensor, nn

from distill_adapters_hunyuan.video15.config import HunyuanVideo15Config
from distill_adapters_hunyuan.video15.kind import IMAGE_TOKENS, reads_image, uses_meanflow

STOCK_LENGTHS = {"max_sequence_length": 1000, "glyph_sequence_length": 256}


class HunyuanVideo15Exporter(PipelineExporter[HunyuanVideo15Config]):
    """``Exporter`` of HunyuanVideo 1.5, for ``HunyuanVideo15Pipeline`` and its image-to-video form.

    Guidance is a component of these pipelines, their guider, and no argument of a call.
    """

    components = (
        *("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "guider"),
        # Of image-to-video alone.
        *("image_encoder", "feature_extractor"),
    )
    grid = UniformGrid()
    pipeline_loads_lora = False

    def call_arguments(self, role: RoleSpec, request: ExportRequest) -> Mapping[str, object]:
        """Return arguments of the pipeline's call; from a picture, clips have the size that the
        pipeline gives it."""
        size = {"height": self.config.height, "width": self.config.width}
        from_image = reads_image(self.family.describe(role.path))
        return {
            "num_inference_steps": request.sampler.steps,
            "num_frames": self.config.num_frames,
            **({} if from_image else size),
        }

    def adapt_components(self, folder: Path, request: ExportRequest) -> None:
        """Write the sampler's guidance into the guider."""
        guider = ClassifierFreeGuidance(guidance_scale=request.sampler.guidance)
        guider.save_pretrained(folder / "guider")

    def probe(self, module: nn.Module, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Draw seeded inputs of four tokens and eight of each text, the last two masked, with a
        picture."""
        transformer: Any = module
        config = transformer.config
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(1, *size, generator=generator).to(dtype)

        mask = (torch.arange(8) < 6)[None].to(dtype)
        side = 2 * config.patch_size
        inputs = {
            "hidden_states": draw(config.in_channels, config.patch_size_t, side, side),
            "timestep": torch.tensor([640.0]),
            "encoder_hidden_states": draw(8, config.text_embed_dim),
            "encoder_attention_mask": mask,
            "encoder_hidden_states_2": draw(8, config.text_embed_2_dim),
            "encoder_attention_mask_2": mask,
            "image_embeds": draw(IMAGE_TOKENS, config.image_embed_dim),
        }
        if uses_meanflow(config):
            inputs["timestep_r"] = torch.tensor([320.0])
        return inputs

    def pipeline_notes(self, role: RoleSpec, request: ExportRequest) -> Iterator[str]:
        """Say where guidance is, what size a picture gets, and which lengths prompts have."""
        w = request.sampler.guidance
        yield (
            "loaded in 16 bits, the pipeline rounds t to them (833.33 to 832 in bf16), and here t "
            "is never rounded"
        )
        if request.format == "lora":
            yield (
                "the pipeline has no load_lora_weights: read the file by "
                "pipeline.transformer.load_lora_adapter(folder), and set "
                f"pipeline.guider = ClassifierFreeGuidance(guidance_scale={w:g})"
            )
        if w == 0:
            yield "its guider takes guidance_scale 0 for the negative prompt alone, in two calls"
        if w not in (0, 1):
            yield "pass the run's negative prompt; the pipeline's own default is the empty one"
        lengths = {name: getattr(self.config, name) for name in STOCK_LENGTHS}
        if lengths != STOCK_LENGTHS:
            yield (
                "the pipeline cuts prompts at 1000 and 256 tokens; set its tokenizer_max_length = "
                f"{lengths['max_sequence_length']} and tokenizer_2_max_length = "
                f"{lengths['glyph_sequence_length']} for clips of longer prompts, and bit for bit"
            )
        model = self.family.describe(role.path)
        if reads_image(model):
            side = int(str(model.main.get("target_size", 640)))
            height, width = self.config.height, self.config.width
            yield "pass the first frame as `image`"
            if (height, width) not in generate_crop_size_list(side, 16):
                yield (
                    f"the pipeline scales a picture to a size of its own for {side} pixels, and "
                    f"{height} x {width} is none of them, so that its clips are of another size"
                )
