"""A complete Wan pipeline folder of 60,000 parameters, random and seeded, built once a session."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import wan_variants
from distill_adapters_wan import PLUGIN, WanPipelineConfig
from distill_protocols import RoleSpec

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pipeline_template(tmp_path_factory):
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    folder = tmp_path_factory.mktemp("wan") / "pipeline"
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


@pytest.fixture
def pipeline(pipeline_template, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(pipeline_template, tmp_path / "pipeline"))


@pytest.fixture(scope="session")
def config():
    return WanPipelineConfig(num_frames=5, height=32, width=48, max_sequence_length=6)


@pytest.fixture(scope="session")
def make_adapter(pipeline_template, config):
    """(adapter, bundle) with one role a keyword: name=(trainable, precision)."""

    def make(*, config=config, source=None, **roles):
        source = str(source or pipeline_template)
        specs = [
            RoleSpec(name=name, path=source, trainable=trainable, precision=precision)
            for name, (trainable, precision) in roles.items()
        ]
        bundle = PLUGIN.load(specs, config, device=torch.device("cpu"))
        return PLUGIN.adapter(bundle, config, source=source), bundle

    return make


@pytest.fixture(scope="session")
def adapter(make_adapter):
    """Role ``teacher``, frozen, fp32."""
    return make_adapter(teacher=(False, "fp32"))[0]


@pytest.fixture
def count_calls():
    """Within: the batch size of every transformer call of the adapter's role ``teacher``."""

    @contextlib.contextmanager
    def counting(adapter):
        calls = []
        transformer = adapter._bundle["teacher"].modules["transformer"]
        hook = transformer.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(len(kwargs["hidden_states"])),
            with_kwargs=True,
        )
        yield calls
        hook.remove()

    return counting


@pytest.fixture(scope="session")
def folder_of(pipeline_template, tmp_path_factory):
    """Name of a variant -> its folder, which no test may change."""
    base, made = tmp_path_factory.mktemp("variants"), {}

    def folder(name):
        if name not in made:
            made[name] = wan_variants.build(name, pipeline_template, base / name)
        return str(made[name])

    return folder
