"""The example package of the SD 3 family, as somebody who installed it uses it."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys

import pytest
import torch
from attrs import evolve
from distill_protocols import ConditioningError, ModelBundle, RoleSpec
from safetensors.torch import load_file
from sd3_pipelines import CLIP_TOKENS, VERSIONS
from workspace import ROOT, read_members

PACKAGE = ROOT / "examples" / "family-sd3"
PROMPTS, LENGTH = ["a seven moving left", "a", ""], 8
CPU = torch.device("cpu")

each_version = pytest.mark.parametrize("version", VERSIONS)


def config_of(sd3, height=32, width=48):
    return sd3.config.SD3PipelineConfig(height=height, width=width, max_sequence_length=LENGTH)


def student(path, **options):
    return RoleSpec(name="student", path=str(path), **{"trainable": False, **options})


def run_python(installed, *arguments):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


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


def test_the_example_is_no_member_of_the_workspace_and_small():
    assert "distill-family-sd3" not in read_members()
    assert "distill-family-sd3" not in (ROOT / "uv.lock").read_text()
    files = sorted((PACKAGE / "src").rglob("*.py"))
    assert 0 < sum(len(file.read_text().splitlines()) for file in files) <= 300


def test_no_file_of_the_framework_names_the_family():
    """It needed no change to the framework: nothing there would have to know of it."""
    name = re.compile(r"\bsd3\b|family.sd3")
    files = [
        file
        for folder in ("packages", "apps", "tools", "configs")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in {".py", ".toml", ".yaml"}
        and not {".venv", "docs"} & set(file.parts)  # the site has the example's page
    ]
    assert len(files) > 200
    assert [str(file) for file in files if name.search(file.read_text())] == []


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
def test_conditions_are_those_of_the_stock_pipeline(sd3, stock, folders, version):
    path, config = str(folders(version)), config_of(sd3)
    adapter = sd3.plugin.PLUGIN.adapter(ModelBundle({}), config, source=path)
    ours = adapter.encode_condition(PROMPTS).tensors
    theirs = stock(version).encode_prompt(PROMPTS, None, None, max_sequence_length=LENGTH)
    assert torch.equal(ours["text"], theirs[0])
    assert torch.equal(ours["pooled"], theirs[2])
    assert ours["text"].shape[1] == CLIP_TOKENS + LENGTH


def test_a_fingerprint_tells_prompts_of_other_lengths_and_encoders_apart(sd3, folders):
    def fingerprint(path, length=LENGTH):
        config = evolve(config_of(sd3), max_sequence_length=length)
        adapter = sd3.plugin.PLUGIN.adapter(ModelBundle({}), config, source=str(path))
        return adapter.condition_fingerprint()

    first = fingerprint(folders())
    own = sd3.plugin.PLUGIN.fingerprint(config_of(sd3), source=str(folders()))
    assert {name for name in own if not name.startswith("vae.")} == first.keys()
    assert own.items() > first.items()
    shorter = fingerprint(folders(), 7)
    assert {name for name in first if shorter[name] != first[name]} == {
        "text_encoder.length",
        "encoder",
    }
    gone = first.keys() - fingerprint(folders("3-medium-without-t5")).keys()
    assert {name.partition(".")[0] for name in gone} == {"text_encoder_3", "tokenizer_3"}


@torch.no_grad()
def test_a_condition_of_another_length_is_refused(sd3, folders):
    config = config_of(sd3)
    bundle = sd3.plugin.PLUGIN.load([student(folders())], config, device=CPU)
    adapter = sd3.plugin.PLUGIN.adapter(bundle, config, source=str(folders()))
    cond, x_t = adapter.encode_condition(["a"]), torch.zeros(1, 4, 1, 4, 6)
    short = type(cond)({**cond.tensors, "text": cond.tensors["text"][:, 1:]})
    with pytest.raises(ConditioningError, match=r"\[84, 32\] a row.*\[85, 32\]"):
        adapter.forward("student", x_t, torch.tensor([500.0]), short)


def test_features_are_the_pictures_hidden_states_and_not_the_texts(sd3, folders):
    config = config_of(sd3)
    bundle = sd3.plugin.PLUGIN.load([student(folders())], config, device=CPU)
    adapter = sd3.plugin.PLUGIN.adapter(bundle, config, source=str(folders()))
    cond, t = adapter.encode_condition(["a", "seven"]), torch.tensor([900.0, 300.0])
    x_t = torch.randn(2, 4, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    outputs = []
    block = bundle["student"].modules["transformer"].get_submodule("transformer_blocks.0")
    hook = block.register_forward_hook(lambda *call: outputs.append(call[2]))
    features = {0: None}
    with torch.no_grad():
        adapter.forward("student", x_t, t, cond, features=features)
    hook.remove()
    _text, image = outputs[0]
    assert features[0].shape == (2, 32, 1, 2, 3)
    assert torch.equal(features[0].flatten(2).transpose(1, 2), image)


def test_latents_are_shaped_as_the_stock_pipeline_draws_them(sd3, stock, folders):
    shape = sd3.plugin.PLUGIN.latent_shape(config_of(sd3), source=str(folders()))
    drawn = stock().prepare_latents(1, 4, 32, 48, torch.float32, "cpu", torch.Generator())
    assert shape == (4, 1, 4, 6)
    assert drawn.unsqueeze(2).shape[1:] == shape


@torch.no_grad()
def test_pictures_are_encoded_and_decoded_as_diffusers_does(sd3, stock, folders):
    adapter = sd3.plugin.PLUGIN.adapter(ModelBundle({}), config_of(sd3), source=str(folders()))
    pixels = torch.rand(2, 3, 1, 32, 48, generator=torch.Generator().manual_seed(0))
    # torch.matmul rounds otherwise where a weight could get a gradient, also under no_grad.
    vae = copy.deepcopy(stock().vae).requires_grad_(False)
    raw = vae.encode(pixels.squeeze(2) * 2 - 1).latent_dist.mode()
    ours = adapter.encode(pixels)
    assert torch.equal(ours.squeeze(2), raw)
    # Stability's own training: (z - shift_factor) * scaling_factor.
    scaled = (ours.squeeze(2) - vae.config.shift_factor) * vae.config.scaling_factor
    latents = adapter.normalize_latents(ours)
    torch.testing.assert_close(latents.squeeze(2), scaled)
    decoded = vae.decode(
        latents.squeeze(2) / vae.config.scaling_factor + vae.config.shift_factor
    ).sample
    pictures = (decoded / 2 + 0.5).clamp(0, 1)
    assert torch.equal(adapter.decode(latents).squeeze(2), pictures)


def test_pictures_that_do_not_fit_the_transformer(sd3, stock, folders, tmp_path):
    def problems(height, **options):
        config = evolve(config_of(sd3, height=height, width=128), **options)
        return [
            problem.message
            for problem in sd3.plugin.PLUGIN.role_problems(student(folders()), config)
        ]

    assert problems(128) == []
    (problem,) = problems(144)
    assert "18 x 16 are larger than 16 x 16" in problem
    with pytest.raises(ValueError, match="cannot be greater than `pos_embed_max_size`"):
        stock().transformer.pos_embed(torch.zeros(1, 4, 18, 16))
    published = "stabilityai/stable-diffusion-3.5-medium"
    (problem,) = problems(128, components=published)
    assert "16 channels and the transformer reads 4" in problem


def test_a_published_model_is_planned_before_it_is_downloaded(sd3):
    hub_id = "stabilityai/stable-diffusion-3.5-large"
    config, plugin = sd3.config.SD3PipelineConfig(height=1024, width=1024), sd3.plugin.PLUGIN
    rows = {"text": (333, 4096), "pooled": (2048,)}
    assert plugin.condition_shapes(config, source=hub_id) == rows
    assert plugin.latent_shape(config, source=hub_id) == (16, 1, 128, 128)
    plan = plugin.plan(student(hub_id), config)
    assert sum(tensor.numel for tensor in plan.modules[0].tensors) == 8_056_627_520
    assert not plan.present
    assert list(plugin.role_problems(student(hub_id), config)) == []


def test_a_call_is_planned_as_it_is_made(sd3, folders):
    config, plugin = config_of(sd3), sd3.plugin.PLUGIN
    role = student(folders(), trainable=True)
    alone, guided = (
        plugin.plan_call(role, config, source=str(folders()), batch=2, guided=guided)
        for guided in (False, True)
    )
    assert guided.most > alone.most > alone.held > 0


def test_stored_positions_are_read_and_not_computed(sd3, folders, monkeypatch):
    """They are 226 million numbers of 3.5 medium, which are in the weights' file."""
    from diffusers.models import embeddings

    devices = []
    compute = embeddings.get_2d_sincos_pos_embed

    def spy(*arguments, **options):
        table = compute(*arguments, **options)
        devices.append(table.device.type)
        return table

    monkeypatch.setattr(embeddings, "get_2d_sincos_pos_embed", spy)
    bundle = sd3.plugin.PLUGIN.load([student(folders())], config_of(sd3), device=CPU)
    assert set(devices) == {"meta"}
    buffer = bundle["student"].modules["transformer"].get_buffer("pos_embed.pos_embed")
    file = folders() / "transformer" / "diffusion_pytorch_model.safetensors"
    assert torch.equal(buffer, load_file(file)["pos_embed.pos_embed"])


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
        transformer = SD3Transformer2DModel(
            **sd3.models.PUBLISHED[hub_id].transformers["transformer"]
        )
    assert sum(p.numel() for p in transformer.parameters()) == parameters
    assert {n: b.numel() for n, b in transformer.named_buffers()} == {
        "pos_embed.pos_embed": positions
    }
    assert "pos_embed.pos_embed" in transformer.state_dict()
    assert f"{parameters:,} | {positions:,} |" in (PACKAGE / "README.md").read_text()
