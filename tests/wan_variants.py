"""Tiny real pipelines of every kind of Wan."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from distill_adapters_wan import WanPipelineConfig


@frozen(kw_only=True)
class Variant:
    """What differs: of the index, of the transformers, and of the run's numbers."""

    experts: int = 1
    channels: bool = False
    embeds: bool = False
    pair: bool = False
    expand: bool = False
    boundary: float = 0.875

    @property
    def image(self) -> bool:
        return self.channels or self.expand

    @property
    def config(self) -> WanPipelineConfig:
        # Wan 2.1's attention separates text from a picture by the number 512.
        length = 512 if self.embeds else 6
        return WanPipelineConfig(num_frames=9, height=32, width=48, max_sequence_length=length)

    @property
    def modules(self) -> tuple[str, ...]:
        return ("transformer", "transformer_2")[: self.experts]


VARIANTS = {
    "t2v": Variant(),
    "t2v-experts": Variant(experts=2),
    "i2v-2.1": Variant(channels=True, embeds=True),
    "flf2v": Variant(channels=True, embeds=True, pair=True),
    "i2v-experts": Variant(experts=2, channels=True, boundary=0.9),
    "ti2v": Variant(expand=True),
}


def template(folder: Path) -> Path:
    """Write a complete text-to-video pipeline of 60,000 parameters, random and seeded."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng():
        torch.manual_seed(7)
        transformer = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=16,
        )  # fmt: skip
        vae = AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, patch_size=2,
            temperal_downsample=[True, True], in_channels=12, out_channels=12,
            scale_factor_temporal=4, scale_factor_spatial=8,
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 1.1, 2.0],
        )  # fmt: skip
        encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
                dropout_rate=0.0, initializer_factor=1.0, pad_token_id=0, eos_token_id=1,
            )
        )  # fmt: skip
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    encoder.save_pretrained(folder / "text_encoder")
    _save_tokenizer(folder / "tokenizer")
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.36.0",
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        # What transformers 5 writes; an export must translate it.
        "tokenizer": ["transformers", "TokenizersBackend"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "a", "seven", "moving", "left", "&"]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def build(name: str, template: Path, folder: Path) -> Path:
    """Write the folder of one variant; each transformer has weights of its own."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    variant = VARIANTS[name]
    shutil.copytree(template, folder)
    index = json.loads((folder / "model_index.json").read_text())
    for seed, module in enumerate(variant.modules):
        with torch.random.fork_rng():
            torch.manual_seed(20 + seed)
            transformer = WanTransformer3DModel(
                num_attention_heads=2, attention_head_dim=12, out_channels=4,
                in_channels=12 if variant.channels else 4, text_dim=16, freq_dim=16, ffn_dim=32,
                num_layers=2, rope_max_seq_len=16, image_dim=20 if variant.embeds else None,
                added_kv_proj_dim=24 if variant.embeds else None,
                pos_embed_seq_len=34 if variant.pair else None,
            )  # fmt: skip
            if variant.pair:  # zero as built, and then nobody sees which picture is the last
                torch.nn.init.normal_(transformer.condition_embedder.image_embedder.pos_embed)
        shutil.rmtree(folder / module, ignore_errors=True)
        transformer.save_pretrained(folder / module)
        index[module] = ["diffusers", "WanTransformer3DModel"]
    if variant.experts == 2:
        index["boundary_ratio"] = variant.boundary
    if variant.channels:
        index["_class_name"] = "WanImageToVideoPipeline"
        index |= {"image_encoder": [None, None], "image_processor": [None, None]}
    if variant.embeds:
        index |= _save_clip(folder)
    index["expand_timesteps"] = variant.expand
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _save_clip(folder: Path) -> dict[str, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    with torch.random.fork_rng():
        torch.manual_seed(3)
        encoder = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=20, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
                image_size=24, patch_size=6,
            )
        )  # fmt: skip
    encoder.save_pretrained(folder / "image_encoder")
    size = {"height": 24, "width": 24}
    CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=size).save_pretrained(
        folder / "image_processor"
    )
    return {
        "image_encoder": ["transformers", "CLIPVisionModel"],
        "image_processor": ["transformers", "CLIPImageProcessor"],
    }
