"""Tiny real pipelines of HunyuanVideo and HunyuanVideo 1.5, one of each published kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny_tokenizer
import torch
from attrs import frozen

TEXT_WIDTH, GLYPH_WIDTH, IMAGE_WIDTH, POOLED = 16, 12, 10, 6
FILLING = 95, 108
"""Tokens of the templates of both pipelines, before the prompt."""


def build(folder: Path) -> Path:
    """Write a HunyuanVideo folder, random and seeded.

    A latent cell spans 4 frames of 8 x 8 pixels, and a token 2 x 2 cells, as in the published one.
    """
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import (
        AutoencoderKLHunyuanVideo,
    )
    from diffusers.models.transformers.transformer_hunyuan_video import (
        HunyuanVideoTransformer3DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        transformer = HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12,
            num_layers=2, num_single_layers=2, num_refiner_layers=1, mlp_ratio=2.0,
            text_embed_dim=TEXT_WIDTH, pooled_projection_dim=POOLED, rope_axes_dim=(4, 4, 4),
        )  # fmt: skip
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2,
        )  # fmt: skip
        encoder = LlamaModel(
            LlamaConfig(
                vocab_size=len(tiny_tokenizer.WORDS), hidden_size=TEXT_WIDTH, intermediate_size=24,
                num_hidden_layers=3, num_attention_heads=2, pad_token_id=0, initializer_range=0.3,
                bos_token_id=1, eos_token_id=1,
            )
        )  # fmt: skip
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tiny_tokenizer.WORDS), hidden_size=POOLED, intermediate_size=12,
                num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=77,
                bos_token_id=1, eos_token_id=1, pad_token_id=0, initializer_range=0.5,
            )
        )  # fmt: skip
    _save(folder, "HunyuanVideoPipeline", shift=7.0, transformer=transformer, vae=vae,
          text_encoder=encoder, text_encoder_2=clip)  # fmt: skip
    _save_tokenizer(folder / "tokenizer", filling=FILLING[0], replaces=True)
    tiny_tokenizer.save(folder / "tokenizer_2", max_length=77)
    return folder


@frozen(kw_only=True)
class Version:
    """What differs between the published kinds of HunyuanVideo 1.5.

    Attributes:
        transformer: arguments beside those that all share.
        image: whether it reads a first frame.
    """

    transformer: Mapping[str, Any] = {}
    image: bool = False


VERSIONS15 = {
    "t2v": Version(),
    "i2v": Version(image=True),
    "i2v-step-distilled": Version(image=True, transformer={"use_meanflow": True}),
}


def build15(folder: Path, version: str = "t2v") -> Path:
    """Write a HunyuanVideo 1.5 folder, random and seeded.

    A latent cell spans 4 frames of 16 x 16 pixels, and is a token, as in the published ones. Of a
    picture, clips have 32 x 32 pixels: the only size that the pipeline gives one here.

    Args:
        folder: where; made if it is not there.
        version: a key of ``VERSIONS15``.
    """
    from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import (
        AutoencoderKLHunyuanVideo15,
    )
    from diffusers.models.transformers.transformer_hunyuan_video15 import (
        HunyuanVideo15Transformer3DModel,
    )
    from transformers import ByT5Tokenizer, Qwen2_5_VLTextModel, T5Config, T5EncoderModel
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

    kind = VERSIONS15[version]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        transformer = HunyuanVideo15Transformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=12,
            num_layers=2, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=TEXT_WIDTH,
            text_embed_2_dim=GLYPH_WIDTH, image_embed_dim=IMAGE_WIDTH, rope_axes_dim=(4, 4, 4),
            target_size=32, **kind.transformer,
        )  # fmt: skip
        vae = AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(4, 4, 8, 8, 8), layers_per_block=1,
        )  # fmt: skip
        encoder = Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(
                vocab_size=len(tiny_tokenizer.WORDS), hidden_size=TEXT_WIDTH, intermediate_size=24,
                num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
                initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=1,
                rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]},
            )
        )  # fmt: skip
        byt5 = T5EncoderModel(
            T5Config(
                vocab_size=384, d_model=GLYPH_WIDTH, d_kv=6, d_ff=16, num_layers=1, num_heads=2,
                dropout_rate=0.0, feed_forward_proj="gated-gelu", initializer_factor=1.0,
                pad_token_id=0, eos_token_id=1,
            )
        )  # fmt: skip
    name = "HunyuanVideo15ImageToVideoPipeline" if kind.image else "HunyuanVideo15Pipeline"
    _save(folder, name, shift=5.0, transformer=transformer, vae=vae, text_encoder=encoder,
          text_encoder_2=byt5)  # fmt: skip
    _save_tokenizer(folder / "tokenizer", filling=FILLING[1], replaces=False)
    ByT5Tokenizer().save_pretrained(folder / "tokenizer_2")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer_2"] = ["transformers", "ByT5Tokenizer"]
    _save_guider(folder, index)
    if kind.image:
        _save_siglip(folder, index)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _save(folder: Path, name: str, *, shift: float, **modules: Any) -> None:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    index: dict[str, Any] = {
        "_class_name": name,
        "_diffusers_version": "0.36.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(folder / "scheduler")
    for key, module in modules.items():
        module.save_pretrained(folder / key)
        library = "transformers" if key.startswith("text") else "diffusers"
        index[key] = [library, type(module).__name__]
    for key in ("tokenizer", "tokenizer_2"):
        index[key] = ["transformers", "PreTrainedTokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index))


def _save_tokenizer(folder: Path, *, filling: int, replaces: bool) -> None:
    """Write the eight words' tokenizer with a template of ``filling`` tokens before the prompt.

    Args:
        replaces: the template is text that the pipeline puts around the prompt, so that the
            tokenizer itself fills up: everything to its last mark is one word, and more of them.
    """
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Replace, Sequence
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = tiny_tokenizer.WORDS
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if replaces:
        head = Regex(r"^[\s\S]*<\|end_header_id\|>")
        tokenizer.normalizer = Sequence(
            [Replace(head, "a " * filling), Replace("<|eot_id|>", " </s>")]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=4096, padding_side="right",
    )  # fmt: skip
    made.chat_template = "{{ 'a ' * " + str(filling) + " }}{{ messages[1]['content'] }} left </s>"
    made.save_pretrained(folder)


def _save_guider(folder: Path, index: dict[str, Any]) -> None:
    from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance

    ClassifierFreeGuidance(guidance_scale=6.0).save_pretrained(folder / "guider")
    index["guider"] = ["diffusers", "ClassifierFreeGuidance"]


def _save_siglip(folder: Path, index: dict[str, Any]) -> None:
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        # 27 x 27 patches, which the pipeline counts on.
        encoder = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=IMAGE_WIDTH, intermediate_size=12, num_hidden_layers=1,
                num_attention_heads=2, image_size=54, patch_size=2,
            )
        )  # fmt: skip
    encoder.save_pretrained(folder / "image_encoder")
    SiglipImageProcessor(size={"height": 54, "width": 54}).save_pretrained(
        folder / "feature_extractor"
    )
    index["image_encoder"] = ["transformers", "SiglipVisionModel"]
    index["feature_extractor"] = ["transformers", "SiglipImageProcessor"]
