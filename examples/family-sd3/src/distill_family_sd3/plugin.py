"""The family as an app sees it before torch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from distill_diffusers.descriptions import LatentInfo, ModelDescription
from distill_diffusers.family import DiffusersFamily
from distill_protocols import Capabilities, RoleSpec

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

    def capabilities(self, config: SD3PipelineConfig) -> Capabilities:
        return Capabilities(
            supports_cfg=True,
            supports_decode=True,
            supports_features=True,
            supports_jvp=True,
            supported_pred_types=frozenset({"v", "x0", "eps"}),
            solvers=frozenset({"euler", "unipc"}),
        )

    def latent_info(self, vae: Mapping[str, Any]) -> LatentInfo:
        halvings = len(vae["block_out_channels"]) - 1
        return LatentInfo(channels=vae["latent_channels"], stride_hw=2**halvings)

    def condition_rows(
        self, transformer: Mapping[str, Any], config: SD3PipelineConfig
    ) -> Mapping[str, tuple[int, ...]]:
        """Give ``text`` [L, D], the tokens of CLIP and then those of T5, and ``pooled`` [P]."""
        length = CLIP_TOKENS + config.max_sequence_length
        return {
            "text": (length, transformer.get("joint_attention_dim", 4096)),
            "pooled": (transformer.get("pooled_projection_dim", 2048),),
        }

    def text_settings(self, config: SD3PipelineConfig) -> Mapping[str, object]:
        return {"text_encoder.length": config.max_sequence_length}

    def fit_problems(
        self, role: RoleSpec, config: SD3PipelineConfig, model: ModelDescription
    ) -> Iterator[str]:
        shape = self.latent_shape(config, source=config.components or role.path)
        channels = model.main.get("in_channels", 16)
        if shape and shape[0] != channels:
            yield (
                f"the VAE makes latents of {shape[0]} channels and the transformer reads "
                f"{channels}; take VAE and transformer of one model"
            )
        most = model.main["pos_embed_max_size"] * model.main.get("patch_size", 2)
        if shape and max(shape[2:]) > most:
            yield (
                f"latents of {shape[2]} x {shape[3]} are larger than {most} x {most}, which is how "
                "far the model's table of positions reaches; make the picture smaller"
            )

    def call_model(self, role: RoleHandle, inputs: Mapping[str, Tensor]) -> Tensor:
        from distill_family_sd3.adapter import call_transformer

        return call_transformer(role, **inputs)

    def adapter(
        self, bundle: ModelBundle, config: SD3PipelineConfig, *, source: str
    ) -> DistillAdapter:
        from distill_family_sd3.adapter import SD3Adapter

        return SD3Adapter(bundle, config, source=source)

    def exporter(self, config: SD3PipelineConfig, *, source: str) -> Exporter:
        from distill_family_sd3.export import SD3Exporter

        return SD3Exporter(self, config, source=source)


PLUGIN = SD3Family()
