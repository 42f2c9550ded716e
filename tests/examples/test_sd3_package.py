"""The example package of the SD 3 family, as somebody who installed it uses it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from sd3_pipelines import CLIP_TOKENS, VERSIONS
from workspace import ROOT, read_members

PACKAGE = ROOT / "examples" / "family-sd3"
PROMPTS, LENGTH = ["a seven moving left", "a", ""], 8

each_version = pytest.mark.parametrize("version", VERSIONS)


@pytest.fixture(scope="module")
def sd3(installed):
    """The installed package's modules; afterwards it is as if it had never been there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(installed))
        names = ("config", "published", "shapes", "text", "plugin")
        modules = {name: importlib.import_module(f"distill_family_sd3.{name}") for name in names}
        yield SimpleNamespace(**modules)
    for name in [name for name in sys.modules if name.startswith("distill_family_sd3")]:
        del sys.modules[name]


def run_python(installed, *arguments):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def pipeline_numbers(folder, part):
    return json.loads((folder / part / "config.json").read_text())


def test_an_app_lists_the_installed_family(installed, sd3):
    result = run_python(installed, "-m", "distill_train", "--plugins")
    assert result.returncode == 0, result.stderr
    families = result.stdout.partition("distill.families")[2].partition("distill.methods")[0]
    assert any(line.split() == ["sd3", *sd3.plugin.PLUGIN.help.split()] for line in
               families.splitlines())  # fmt: skip


def test_a_run_file_is_checked_without_torch(installed):
    script = "import sys, distill_family_sd3.plugin; sys.exit('torch' in sys.modules)"
    assert run_python(installed, "-c", script).returncode == 0


def test_the_wheel_has_licence_and_types(installed):
    licence = installed / "distill_family_sd3-1.0.0.dist-info" / "licenses" / "LICENSE"
    assert licence.read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (installed / "distill_family_sd3" / "py.typed").is_file()


def test_it_is_no_member_of_the_workspace_and_small():
    assert "distill-family-sd3" not in read_members()
    assert "distill-family-sd3" not in (ROOT / "uv.lock").read_text()
    files = sorted((PACKAGE / "src").rglob("*.py"))
    assert 0 < sum(len(file.read_text().splitlines()) for file in files) <= 300


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"height": 40}, r"40 must be divisible by 16.*32 or 48"),
        ({"width": 0}, r"0 must be divisible by 16.*16 or 32"),
        ({"max_sequence_length": 513}, r"513 must be within \[1, 512\]"),
    ],
)
def test_wrong_sections(sd3, changed, message):
    with pytest.raises(ValueError, match=message):
        sd3.config.SD3PipelineConfig(**{"height": 32, "width": 48, **changed})


@each_version
@torch.no_grad()
def test_conditions_are_those_of_the_stock_pipeline(sd3, stock, version):
    pipeline = stock(version)
    tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3)
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
    width = pipeline.transformer.config.joint_attention_dim
    ours = sd3.text.encode_prompts(PROMPTS, tokenizers, encoders, length=LENGTH, width=width)
    theirs = pipeline.encode_prompt(PROMPTS, None, None, max_sequence_length=LENGTH)
    assert torch.equal(ours["text"], theirs[0])
    assert torch.equal(ours["pooled"], theirs[2])
    config = sd3.config.SD3PipelineConfig(height=32, width=48, max_sequence_length=LENGTH)
    assert sd3.shapes.condition_shapes(
        config, pipeline.transformer.config, clip_tokens=CLIP_TOKENS
    ) == {name: tuple(value.shape[1:]) for name, value in ours.items()}


def test_latents_are_shaped_as_the_stock_pipeline_draws_them(sd3, stock, folders):
    config = sd3.config.SD3PipelineConfig(height=32, width=48)
    shape = sd3.shapes.latent_shape(config, pipeline_numbers(folders(), "vae"))
    drawn = stock().prepare_latents(1, 4, 32, 48, torch.float32, "cpu", torch.Generator())
    assert shape == (4, 1, 4, 6)
    assert drawn.unsqueeze(2).shape[1:] == shape


def test_pictures_that_do_not_fit_the_transformer(sd3, stock, folders):
    numbers = pipeline_numbers(folders(), "transformer")
    assert list(sd3.shapes.size_problems((4, 1, 16, 16), numbers)) == []
    (problem,) = sd3.shapes.size_problems((4, 1, 18, 16), numbers)
    assert "18 x 16 are larger than 16 x 16" in problem
    with pytest.raises(ValueError, match="cannot be greater than `pos_embed_max_size`"):
        stock().transformer.pos_embed(torch.zeros(1, 4, 18, 16))
    (problem,) = sd3.shapes.size_problems((16, 1, 16, 16), numbers)
    assert "16 channels and the transformer reads 4" in problem


@pytest.mark.parametrize(
    ("hub_id", "parameters", "positions"),
    [
        ("stabilityai/stable-diffusion-3-medium-diffusers", 2_028_328_000, 56_623_104),
        ("stabilityai/stable-diffusion-3.5-medium", 2_243_171_520, 226_492_416),
        ("stabilityai/stable-diffusion-3.5-large", 8_056_627_520, 89_653_248),
    ],
)
def test_sizes_of_the_published_models(sd3, hub_id, parameters, positions):
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**sd3.published.PUBLISHED[hub_id])
    assert sum(p.numel() for p in transformer.parameters()) == parameters
    assert {n: b.numel() for n, b in transformer.named_buffers()} == {
        "pos_embed.pos_embed": positions
    }
    assert "pos_embed.pos_embed" in transformer.state_dict()
    assert f"{parameters:,} | {positions:,} |" in (PACKAGE / "README.md").read_text()
