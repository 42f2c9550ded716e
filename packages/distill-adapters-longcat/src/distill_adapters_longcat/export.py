"""One LongCat-Video role where its original code can read it: a folder of its layout, or a LoRA.

diffusers has no pipeline of the model. A folder has ``dit/``, ``vae/``, ``text_encoder/``,
``tokenizer/`` and ``scheduler/``, as meituan-longcat/LongCat-Video at commit 6b3f4b8 reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from distill_diffusers.export.exporter import PipelineExporter
from distill_diffusers.export.formats import Export, LoraContents, LoraNames
from distill_diffusers.export.verification import call_with_probe
from distill_diffusers.kinds import load_class
from distill_diffusers.sampling.scheduler import StockSchedule, UniformGrid
from distill_diffusers.weights.sources import FileWeights
from distill_protocols import ExportRequest, RoleSpec
from torch import Tensor, nn

from distill_adapters_longcat.config import LongCatPipelineConfig

LAST_SIGMA = 0.001
_HYPHEN = "___lorahyphen___"


class LongCatGrid(UniformGrid):
    """linspace(1, 0.001, N), which the original pipeline gives its scheduler."""

    def last(self, steps: int, shift: float) -> float:
        return LAST_SIGMA


class LongCatExporter(PipelineExporter[LongCatPipelineConfig]):
    """``Exporter`` of LongCat-Video, for its original code."""

    components = ("vae", "text_encoder", "tokenizer")
    config_arguments = ("num_frames", "height", "width", "max_sequence_length")
    grid = LongCatGrid()

    def probe(self, module: nn.Module, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Draw seeded inputs of two frames of two tokens and of six of text, two of them padding.

        The first frame is given.
        """
        transformer: Any = module
        config = transformer.config
        generator = torch.Generator().manual_seed(0)
        _, height, width = config.patch_size
        size = (1, config.in_channels, 2, height, 2 * width)
        text = torch.randn(1, 6, config.caption_channels, generator=generator)
        return {
            "hidden_states": torch.randn(size, generator=generator).to(dtype),
            "timestep": torch.tensor([[0.0, 640.0]]),
            "encoder_hidden_states": text.to(dtype),
            "encoder_attention_mask": (torch.arange(6) < 4)[None].float(),
        }

    def sampler_notes(
        self, role: RoleSpec, request: ExportRequest, schedule: StockSchedule
    ) -> Iterator[str]:
        """Say how the original loads a LoRA, too."""
        yield from super().sampler_notes(role, request, schedule)
        if request.format == "lora":
            rank = request.lora_rank if role.lora is None else role.lora.rank
            yield (
                "the original's dit.load_lora takes the file with its rank: "
                f"load_lora(path, key, lora_network_dim={rank})"
            )

    def pipeline_notes(self, role: RoleSpec, request: ExportRequest) -> Iterator[str]:
        """Say what ``LongCatVideoPipeline`` does with guidance, times and given frames."""
        if request.sampler.guidance < 1:
            yield (
                f"LongCatVideoPipeline treats guidance_scale {request.sampler.guidance:g} as 1 (it "
                "guides only above 1), so it cannot repeat this sampler"
            )
        if request.sampler.guidance > 1:
            yield "pass the run's negative prompt; the pipeline's own default is the empty one"
        yield (
            "`call` is for generate_t2v and generate_i2v; generate_vc must have enhance_hf=False. "
            "The pipeline rounds t to the type of its weights, and draws given frames from what "
            "the VAE makes of them (latent_dist.sample)"
        )

    # -- LoRA ---------------------------------------------------------------------------------

    def lora_files(self, export: Export, module: str) -> Mapping[str, LoraNames]:
        """Return the one file, under the names of the original's ``lora_utils.py``."""
        (file,) = super().lora_files(export, module)
        return {file: ORIGINAL_LORA}

    def outputs_with_lora(
        self, base: Path, module: str, file: Path, contents: LoraContents,
        probe: Mapping[str, Tensor],
    ) -> Tensor:  # fmt: skip
        """Add to the output of each layer what the original's ``load_lora`` does."""
        transformer: nn.Module = load_class(self.kind.transformer).from_pretrained(
            base, subfolder=module, torch_dtype=torch.float32, use_safetensors=True
        )
        source = FileWeights(str(file), [file])
        tensors = source.read(source.describe())
        for name in [name for name in tensors if name.endswith(".lora_down.weight")]:
            layer = name.removesuffix(".lora_down.weight")
            down, up = tensors[name].float(), tensors[f"{layer}.lora_up.weight"].float()
            scale = tensors[f"{layer}.alpha_scale"]

            def add(
                _: nn.Module,
                inputs: tuple[Tensor],
                output: Tensor,
                down: Tensor = down,
                up: Tensor = up,
                scale: Tensor = scale,
            ) -> Tensor:
                return output + F.linear(F.linear(inputs[0], down), up) * scale

            _, *path = layer.split(_HYPHEN)
            transformer.get_submodule(".".join(path)).register_forward_hook(add)
        return call_with_probe(transformer, probe)


def _original_name(layer: str) -> str:
    return _HYPHEN.join(["lora", *layer.split(".")])


ORIGINAL_LORA = LoraNames(
    factor=lambda layer, side: (
        f"{_original_name(layer)}.lora_{'down' if side == 'A' else 'up'}.weight"
    ),
    scale=lambda layer: f"{_original_name(layer)}.alpha_scale",
)
"""Its reader takes factors alone, neither biases nor other differences."""
