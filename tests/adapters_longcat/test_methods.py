"""The app trains a tiny LongCat-Video, also sharded, and its exports are read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from app_ranks import assert_weights_alike, read_losses, read_weights
from app_ranks import train as train_rank
from distill_adapters_longcat import PLUGIN, LongCatPipelineConfig, LongCatVideoTransformer3DModel
from distill_conditioning import ShardWriter, preprocess
from distill_protocols import DynamicShift, ModelBundle, RoleSpec, SamplerSpec
from distill_runfile.cli import EXIT_INCOMPLETE
from distill_runfile.read import read_config
from distill_train.build import Run, build
from distill_train.cli import main
from ranks import run_on_ranks
from tiny_run import one_process

CLIP = {"num_frames": 9, "height": 32, "width": 48, "max_sequence_length": 8}
PROMPT, NEGATIVE = "a seven moving left", "moving"
ROOT = Path(__file__).resolve().parents[2]
HUB_ID = "meituan-longcat/LongCat-Video"


@pytest.fixture(scope="module")
def data(longcat_folder, tmp_path_factory) -> Path:
    """Encode four clips that go on from five frames."""
    folder = tmp_path_factory.mktemp("clips") / "data"
    source = str(longcat_folder)
    adapter = PLUGIN.adapter(ModelBundle({}), LongCatPipelineConfig(**CLIP), source=source)
    generator = torch.Generator().manual_seed(0)
    clips = ((f"{i}", PROMPT, torch.rand(3, 9, 32, 48, generator=generator)) for i in range(4))
    with ShardWriter(folder) as writer:
        preprocess(clips, adapter, writer, negative_prompt=NEGATIVE, first_frames=5)
    return folder


@pytest.fixture
def run_file(longcat_folder, data, tmp_path):
    """Return ``run_file(method, models, options, out=..., **sections)``, which writes a file."""

    def write(
        method: str, models: dict[str, Any], options: dict[str, Any], *, out: str = "out",
        **sections: Any,
    ) -> Path:  # fmt: skip
        values = {
            "recipe": {"family": "longcat", "method": method},
            "models": {
                n: keys if "base" in keys else {"path": str(longcat_folder), **keys}
                for n, keys in models.items()
            },
            "training": {
                "output_dir": str(tmp_path / out), "max_train_steps": 3, "progress": False,
                "global_batch_size": 2, "log_every": 1, "trackers": ["jsonl"],
                "optimizer": {"lr": 1e-3}, **sections.pop("training", {}),
            },
            "data": {"path": str(data)},
            "pipeline_config": CLIP,
            "method_config": options,
            "checkpoint": {
                "export": [{"role": "student", "folder": "student", "verify": True}],
            },
            "callbacks": {"grad_clip": {}},
            **sections,
        }  # fmt: skip
        file = tmp_path / f"{out}.yaml"
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        return file

    return write


def train(file: Path) -> Run:
    run = build(read_config(file), distribution=one_process())
    run.trainer.run(run.method, run.loader)
    return run


@pytest.mark.slow
def test_two_processes_that_shard_train_as_one_does(run_file, tmp_path):
    """On clips that go on from given frames, with blocks that are computed again."""
    models = {"student": {"activation_checkpointing": True}}
    options = {"student_sampler": {"steps": 2, "shift": 3.0, "guidance": 4.0}}
    fsdp = {"distributed": {"strategy": "fsdp2"}, "batch_size_per_device": 1}
    extracted = {"role": "student", "folder": "lora", "format": "lora", "lora_rank": 4}
    export = {"export": [extracted | {"verify": True}]}
    one = run_file("finetune", models, options, out="one", checkpoint=export)
    two = run_file("finetune", models, options, out="two", training=fsdp)
    assert run_on_ranks(train_rank, one, size=1) == [""]
    assert run_on_ranks(train_rank, two, size=2) == ["", ""]
    a, b = read_losses(tmp_path / "one"), read_losses(tmp_path / "two")
    assert len(a) == 3
    for iteration, numbers in a.items():
        for name, value in numbers.items():
            if name.startswith("loss/"):
                assert b[iteration][name] == pytest.approx(value, rel=2e-4), (iteration, name)
    record = json.loads((tmp_path / "one" / "lora" / "sampler_spec.json").read_text())
    assert any("the biases of" in note for note in record["notes"])
    ours, theirs = (read_weights(tmp_path / out, module="dit") for out in ("one", "two"))
    assert_weights_alike(ours, theirs)


def test_lora_roles_come_out_merged_and_as_the_originals_file(run_file, tmp_path, longcat_folder):
    """The file is verified as the original adds it, and a role starts from it again."""
    lora = {"base": "teacher", "lora": {"rank": 2, "alpha": 1}}
    options = {
        "generator_update_interval": 2, "real_score_guidance_scale": 4.0,
        "student_sampler": {"steps": 2, "timesteps": [1000, 700], "stochastic": True},
    }  # fmt: skip
    export = [
        {"role": "student", "folder": "student", "verify": True},
        {"role": "student", "folder": "lora", "format": "lora", "verify": True},
    ]
    models = {"teacher": {}, "student": lora, "critic": lora}
    train(run_file("dmd2", models, options, checkpoint={"export": export}))
    folder = tmp_path / "out" / "student"
    assert not (folder / "model_index.json").exists()
    assert {path.name for path in folder.iterdir()} == {
        "dit", "vae", "text_encoder", "tokenizer", "scheduler", "sampler_spec.json",
    }  # fmt: skip
    merged = LongCatVideoTransformer3DModel.from_pretrained(folder, subfolder="dit")
    assert merged.config["enable_flashattn2"]
    role = RoleSpec(name="teacher", path=str(longcat_folder), trainable=True)
    start = PLUGIN.start_weights(role, str(tmp_path / "out" / "lora"))
    again = start["dit"].read(start["dit"].describe())
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-6)
    base = LongCatVideoTransformer3DModel.from_pretrained(longcat_folder, subfolder="dit")
    changed = {
        name.rsplit(".", 2)[-2]
        for name, tensor in base.state_dict().items()
        if not torch.equal(tensor, merged.state_dict()[name])
    }
    assert changed == {"qkv", "proj", "q_linear", "kv_linear", "w1", "w2", "w3"}


@pytest.mark.parametrize("name", ["finetune_13.6b", "dmd2_13.6b", "dmd2_13.6b_lora"])
def test_shipped_run_files_have_the_originals_numbers(name):
    """93 frames of 480 x 832, CFG-zero of 4, and levels down to 0.001, shifted by 12."""
    file = ROOT / "configs" / "longcat" / f"{name}.yaml"
    config = read_config(file, planning=True, world_size=8)
    assert PLUGIN.clip_shapes(config.pipeline) == ((93, 480, 832),)
    assert PLUGIN.latent_tokens(config.pipeline, source=HUB_ID) == 24 * 30 * 52
    text = yaml.safe_load(file.read_text())
    views = text["validation"]["views"].values()
    sampler = next((view["sampler"] for view in views if "sampler" in view), None)
    spec = config_sampler(sampler or text["method_config"]["student_sampler"])
    grid = torch.linspace(1, 0.001, 50)
    assert spec.sigmas() == pytest.approx((12 * grid / (1 + 11 * grid)).tolist(), abs=1e-6)
    assert spec.guidance == 4


def config_sampler(keys: dict[str, Any]) -> SamplerSpec:
    return SamplerSpec(**{**keys, "shift": DynamicShift(**keys["shift"])}).resolved(1)


@pytest.mark.slow  # 20 s: blocks of 13.6B on fake tensors
def test_a_shipped_run_file_is_planned_without_weights(capsys):
    file = ROOT / "configs" / "longcat" / "dmd2_13.6b_lora.yaml"
    assert main(["--config", str(file), "--dry-run", "--world-size", "8"]) == EXIT_INCOMPLETE
    assert "48 layers of width 4096" in capsys.readouterr().out
