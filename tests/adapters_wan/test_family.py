"""The family's checks of a folder, a hub id and a clip before anything is loaded."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import attrs
import pytest
import torch
from distill_adapters_wan import PLUGIN, PUBLISHED, WanPipelineConfig
from distill_protocols import RoleSpec, WeightsError

REAL = WanPipelineConfig(num_frames=81, height=480, width=832)
SMALL_ID = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def role(path, **kwargs):
    return RoleSpec(name="student", path=str(path), **{"trainable": True, **kwargs})


def problems(path, config):
    return "\n".join(p.message for p in PLUGIN.role_problems(role(path), config))


def test_a_whole_folder_has_no_problem(pipeline, config):
    assert not list(PLUGIN.role_problems(role(pipeline), config))


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
    ],
)
def test_a_missing_file_is_named(pipeline, config, file):
    (pipeline / file).unlink()
    assert file.rsplit("/", 1)[-1] in problems(pipeline, config)
    assert str((pipeline / file).parent) in problems(pipeline, config)


def test_stored_embeddings_need_no_text_encoder(pipeline, config):
    import shutil

    shutil.rmtree(pipeline / "text_encoder")
    shutil.rmtree(pipeline / "tokenizer")
    assert not list(PLUGIN.role_problems(role(pipeline), config))


def test_a_missing_shard_is_named(pipeline, config):
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    transformer = WanTransformer3DModel.from_pretrained(pipeline / "transformer")
    (pipeline / "transformer/diffusion_pytorch_model.safetensors").unlink()
    transformer.save_pretrained(pipeline / "transformer", max_shard_size="60KB")
    shards = sorted((pipeline / "transformer").glob("*.safetensors"))
    assert len(shards) > 1
    assert not list(PLUGIN.role_problems(role(pipeline), config))
    PLUGIN.load([role(pipeline)], config, device=torch.device("cpu"))
    shards[1].unlink()
    assert shards[1].name in problems(pipeline, config)


def test_a_truncated_file_is_a_problem_before_loading(pipeline, config):
    file = pipeline / "transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert str(file) in problems(pipeline, config)
    assert not PLUGIN.plan(role(pipeline), config).present


def test_a_git_lfs_pointer_is_a_problem(pipeline, config):
    file = pipeline / "vae/diffusion_pytorch_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    assert "LFS" in problems(pipeline, config)


def test_a_folder_that_is_not_there(tmp_path, config):
    reported = problems(tmp_path / "nope" / "wan", config)
    assert str(tmp_path / "nope" / "wan") in reported
    assert f"nearest that exists is {tmp_path}" in reported


def test_components_of_another_folder_are_checked_there(pipeline, tmp_path, config):
    bare = tmp_path / "bare"
    (pipeline / "transformer").rename(tmp_path / "transformer")
    bare.mkdir()
    (tmp_path / "transformer").rename(bare / "transformer")
    (pipeline / "model_index.json").rename(bare / "model_index.json")
    assert "vae" in problems(bare, config)
    elsewhere = attrs.evolve(config, components=str(pipeline))
    assert not list(PLUGIN.role_problems(role(bare), elsewhere))
    (pipeline / "vae/config.json").unlink()
    (problem, *_) = PLUGIN.config_problems(elsewhere, ())
    assert problem.path == ("components",)
    assert str(pipeline / "vae/config.json") in problem.message


@pytest.mark.parametrize(
    ("change", "word"),
    [({"height": 40}, "height 40"), ({"width": 272}, "positions"), ({"num_frames": 7}, "4k")],
)
def test_a_clip_that_does_not_fit_is_a_problem(pipeline, config, change, word):
    with attrs.validators.disabled():  # other VAEs have other strides than the config's own rule
        wrong = attrs.evolve(config, **change)
    assert word in problems(pipeline, wrong)


def test_other_channels_than_the_vae(pipeline, config):
    file = pipeline / "vae/config.json"
    statistics = {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    file.write_text(json.dumps({**json.loads(file.read_text()), "z_dim": 16, **statistics}))
    assert "makes 4 latent channels but the VAE makes 16" in problems(pipeline, config)


@pytest.mark.parametrize(
    ("hub_id", "parameters"),
    [
        (SMALL_ID, 1_418_996_800),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", 14_288_491_584),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", 2 * 14_288_491_584),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", 4_999_787_712),
    ],
)
def test_published_counts(hub_id, parameters):
    plan = PLUGIN.plan(role(hub_id), REAL)
    assert plan.parameters == parameters
    assert not plan.present


def test_a_published_hub_id_can_be_planned_offline_but_not_loaded():
    assert not list(PLUGIN.role_problems(role(SMALL_ID), REAL))
    with pytest.raises(WeightsError, match=f"hf download {re.escape(SMALL_ID)}"):
        PLUGIN.load([role(SMALL_ID)], REAL, device=torch.device("cpu"))


def test_hub_ids_that_cannot_be_planned_are_problems():
    assert f"did you mean {SMALL_ID}?" in problems("Wan-AI/Wan2.1-T2V-1.3B", REAL)
    assert "hf download some/model" in problems("some/model", REAL)


@pytest.mark.parametrize("path", ["models/wan", "models/wan--x", "models/wan..x", "models/wan.git"])
def test_the_error_of_a_folder_without_its_dot_shows_the_syntax(pipeline, config, path):
    assert f"for a folder write ./{path}" in problems(path, REAL)
    (problem,) = PLUGIN.config_problems(attrs.evolve(config, components=path), ())
    assert problem.path == ("components",)
    assert f"for a folder write ./{path}" in problem.message


def test_condition_shapes(pipeline, config):
    assert PLUGIN.condition_shapes(config, source=str(pipeline)) == {"text": (6, 16)}
    assert PLUGIN.condition_shapes(REAL, source=SMALL_ID) == {"text": (512, 4096)}
    assert PLUGIN.condition_shapes(REAL, source="some/model") == {}


@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_every_published_model_is_taken(hub_id):
    assert problems(hub_id, attrs.evolve(REAL, width=832 - 832 % 32)) == ""


def test_plan_counts_what_load_loads(pipeline, config):
    (module,) = PLUGIN.plan(role(pipeline), config).modules
    loaded = PLUGIN.load([role(pipeline)], config, device=torch.device("cpu"))
    transformer = loaded["student"].modules["transformer"]
    assert module.parameters == sum(p.numel() for p in transformer.parameters())
    assert module.buffers == sum(b.numel() for b in transformer.buffers())
    assert PLUGIN.plan(role(pipeline), config).present


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [("num_frames", 80, "77 or 81"), ("height", 470, "464 or 480"), ("width", 0, "16 or 32")],
)
def test_config_rules(field, value, hint):
    with pytest.raises(ValueError, match=hint):
        attrs.evolve(REAL, **{field: value})


def test_the_descriptor_needs_no_torch(pipeline):
    code = (
        "import sys\n"
        "from distill_adapters_wan import PLUGIN, WanPipelineConfig\n"
        "from distill_protocols import RoleSpec\n"
        "c = WanPipelineConfig(num_frames=5, height=32, width=48)\n"
        f"here = RoleSpec(name='s', path={str(pipeline)!r}, trainable=True)\n"
        "list(PLUGIN.role_problems(here, c))\n"
        f"PLUGIN.condition_shapes(c, source={str(pipeline)!r})\n"
        f"list(PLUGIN.role_problems(RoleSpec(name='s', path={SMALL_ID!r}, trainable=True), c))\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
