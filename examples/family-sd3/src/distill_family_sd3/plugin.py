"""The family as an app sees it before torch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from distill_diffusers.descriptions import LatentInfo
from distill_diffusers.family import DiffusersFamily
from distill_diffusers.model_configs import read_integer, read_integers

from distill_family_sd3.config import SD3PipelineConfig
from distill_family_sd3.models import CLIP_TOKENS, PUBLISHED, SD3

if TYPE_CHECKING:
    from distill_protocols import DistillAdapter, Exporter, ModelBundle, RoleHandle
    from torch import Tensor


class SD3Family(DiffusersFamily[SD3PipelineConfig]):
    """Stable Diffusion 3 and 3.5. A picture is a clip of one frame."""

    name = "sd3"
    contract = 2
    help = "Stable Diffusion 3 and 3.5, from Diffusers-format folders or hub ids"
    config_class = SD3PipelineConfig
    kind = SD3
    published = PUBLISHED

    def latent_info(self, vae: Mapping[str, object]) -> LatentInfo:
        halvings = len(read_integers(vae, "block_out_channels")) - 1
        return LatentInfo(channels=read_integer(vae, "latent_channels"), stride_hw=2**halvings)

    def condition_rows(
        self, transformer: Mapping[str, object], config: SD3PipelineConfig
    ) -> Mapping[str, tuple[int, ...]]:
        """Give ``text`` [L, D], the tokens of CLIP and then those of T5, and ``pooled`` [P]."""
        length = CLIP_TOKENS + config.max_sequence_length
        return {
            "text": (length, read_integer(transformer, "joint_attention_dim", 4096)),
            "pooled": (read_integer(transformer, "pooled_projection_dim", 2048),),
        }

    def text_settings(self, config: SD3PipelineConfig) -> Mapping[str, object]:
        return {"text_encoder.length": config.max_sequence_length}

    def clip_problems(
        self, config: SD3PipelineConfig, latents: LatentInfo, transformer: Mapping[str, object]
    ) -> Iterator[str]:
        channels = read_integer(transformer, "in_channels", 16)
        if latents.channels != channels:
            yield (
                f"the VAE makes latents of {latents.channels} channels and the transformer reads "
                f"{channels}; take VAE and transformer of one model"
            )
        _, _, height, width = latents.shape(1, config.height, config.width)
        positions = read_integer(transformer, "pos_embed_max_size")
        most = positions * read_integer(transformer, "patch_size", 2)
        if max(height, width) > most:
            yield (
                f"latents of {height} x {width} are larger than {most} x {most}, which is how "
                "far the model's table of positions reaches; make the picture smaller"
            )

    def call_model(self, role: RoleHandle, inputs: Mapping[str, Tensor]) -> Tensor:
        from distill_family_sd3.adapter import call_transformer

        return call_transformer(role, **inputs)

    def adapter(
        self, bundle: ModelBundle, config: SD3PipelineConfig, *, source: str
    ) -> DistillAdapter:
        from distill_family_sd3.adapter import SD3Adapter

        return SD3Adapter(bundle, self, config, source=source)

    def exporter(self, config: SD3PipelineConfig, *, source: str) -> Exporter:
        from distill_family_sd3.export import SD3Exporter

        return SD3Exporter(self, config, source=source)


PLUGIN = SD3Family()
