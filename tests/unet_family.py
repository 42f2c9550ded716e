"""A family with a U-Net, as SDXL is: variance preserving, eps, two text encoders, sizes as numbers.

It is a family of the tests: enough to train and to sample, and no exports.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sd3_pipelines
import torch
from attrs import evolve
from distill_diffusers.adapter import device_of
from distill_diffusers.calls.precision import call_in_precision
from distill_diffusers.components.encoders import TextEncoders, numbered_parts
from distill_diffusers.config import ImageConfig
from distill_diffusers.descriptions import LatentInfo
from distill_diffusers.family import CAPABILITIES, DiffusersFamily
from distill_diffusers.folders import fetch, locate, read_json
from distill_diffusers.images import ImageAdapter
from distill_diffusers.kinds import ModelKind
from distill_diffusers.model_configs import read_integer, read_integers
from distill_diffusers.noise_levels import NoiseLevels
from distill_diffusers.variance_preserving import VariancePreservingAdapter
from distill_protocols import (
    Capabilities,
    CapabilityError,
    Condition,
    Exporter,
    ModelBundle,
    RoleHandle,
    RoleSpec,
)
from torch import Tensor

CLIP = "transformers.models.clip.modeling_clip:CLIPTextModel"
PROJECTED = "transformers.models.clip.modeling_clip:CLIPTextModelWithProjection"
# Stable Diffusion XL's own: 1000 levels that end at s = 0.9359.
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
UNET = ModelKind(
    transformer="diffusers.models.unets.unet_2d_condition:UNet2DConditionModel",
    vae="diffusers.models.autoencoders.autoencoder_kl:AutoencoderKL",
    pipelines=(
        "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl:"
        "StableDiffusionXLPipeline",
    ),
    modules=("unet",),
    stored_like="conv_in.weight",
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    block_lists=("down_blocks", "up_blocks"),
)


class UnetFamily(DiffusersFamily[ImageConfig]):
    name = "unet"
    contract = 2
    help = "tiny models as SDXL's"
    config_class = ImageConfig
    kind = UNET

    def capabilities(self, config: ImageConfig) -> Capabilities:
        return evolve(
            CAPABILITIES,
            supports_expert_routing=True,
            supports_features=False,
            solvers=frozenset({"euler"}),
        )

    def expert_ranges(
        self, role: RoleSpec, config: ImageConfig
    ) -> Mapping[str, tuple[float, float]]:
        folder = locate(role.path)
        return {} if folder is None else {"unet": read_levels(folder).time_range}

    def latent_info(self, vae: Mapping[str, object]) -> LatentInfo:
        halvings = len(read_integers(vae, "block_out_channels")) - 1
        return LatentInfo(channels=read_integer(vae, "latent_channels"), stride_hw=2**halvings)

    def condition_rows(
        self, transformer: Mapping[str, object], config: ImageConfig
    ) -> Mapping[str, tuple[int, ...]]:
        sizes = 6 * read_integer(transformer, "addition_time_embed_dim")
        pooled = read_integer(transformer, "projection_class_embeddings_input_dim") - sizes
        return {
            "text": (sd3_pipelines.CLIP_TOKENS, read_integer(transformer, "cross_attention_dim")),
            "pooled": (pooled,),
        }

    def export_formats(self) -> Mapping[str, str]:
        return {}

    def plan_call(self, role: RoleSpec, config: ImageConfig, **_: Any) -> None:
        """Of a U-Net no two blocks are alike, so a call cannot be planned from two of them."""
        return

    def call_model(self, role: RoleHandle, inputs: Mapping[str, Tensor]) -> Tensor:
        latents = inputs["latents"].squeeze(2)
        size = [8 * n for n in latents.shape[2:]]
        sizes = latents.new_tensor([*size, 0, 0, *size]).expand(len(latents), -1)
        with call_in_precision(role, "unet", UNET, latents.device) as dtype:
            (eps,) = role.modules["unet"](
                latents.to(dtype),
                inputs["t"],
                encoder_hidden_states=inputs["text"].to(dtype),
                added_cond_kwargs={"text_embeds": inputs["pooled"].to(dtype), "time_ids": sizes},
                return_dict=False,
            )
        return eps.unsqueeze(2)

    def adapter(self, bundle: ModelBundle, config: ImageConfig, *, source: str) -> UnetAdapter:
        return UnetAdapter(bundle, self, config, source=source)

    def exporter(self, config: ImageConfig, *, source: str) -> Exporter:
        raise CapabilityError("this family exports nothing")


class UnetAdapter(VariancePreservingAdapter, ImageAdapter):
    pipeline_batches_guidance = True

    def __init__(
        self, bundle: ModelBundle, family: UnetFamily, config: ImageConfig, *, source: str
    ) -> None:
        self._levels = read_levels(fetch(source, ("scheduler",)))
        self._text = TextEncoders(
            source, numbered_parts(source, (CLIP, PROJECTED)), device=device_of(bundle)
        )
        super().__init__(bundle, family, config, source=source, encoders=self._text)

    @property
    def noise_levels(self) -> NoiseLevels:
        return self._levels

    def encode_condition(self, raw_cond: Sequence[str]) -> Condition:
        outputs = [self._text.outputs(name, raw_cond) for name in self._text.names]
        text = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return Condition({"text": text.float(), "pooled": outputs[-1].text_embeds.float()})


PLUGIN = UnetFamily()


def read_levels(folder: Path) -> NoiseLevels:
    return NoiseLevels.of_scheduler(read_json(folder / "scheduler" / "scheduler_config.json"))


def build(folder: Path, prediction: str = "epsilon") -> Path:
    """Write a complete pipeline folder, random and seeded."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        unet = UNet2DConditionModel(
            in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=4,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4),
            cross_attention_dim=sum(sd3_pipelines.CLIP_WIDTHS), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=sd3_pipelines.CLIP_WIDTHS[1] + 6 * 4,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=2, scaling_factor=0.13025,
        )  # fmt: skip
        encoders = [sd3_pipelines.make_clip(width) for width in sd3_pipelines.CLIP_WIDTHS]
        plain = CLIPTextModel(encoders[0].config)
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    DDIMScheduler(**SCHEDULER, clip_sample=False, prediction_type=prediction).save_pretrained(
        folder / "scheduler"
    )
    for encoder, end in ((plain, ""), (encoders[1], "_2")):
        encoder.save_pretrained(folder / f"text_encoder{end}")
        sd3_pipelines.save_tokenizer(folder / f"tokenizer{end}", pad="<pad>", begins=True)
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": "0.32.0",
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "TokenizersBackend"],
        "tokenizer_2": ["transformers", "TokenizersBackend"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
