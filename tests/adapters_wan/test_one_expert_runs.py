"""Whole runs that train one of two experts, and run files that cannot."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
import yaml
from distill_checkpoint import StoredCheckpoint
from distill_protocols import ConfigError
from distill_runfile import describe
from distill_runfile.plan import horizons
from distill_runfile.read import read_config
from distill_sample import read_sample_source
from distill_train.build import build
from distill_train.run import run
from safetensors.torch import load_file
from tiny_run import one_process

HIGH, LOW = "transformer", "transformer_2"


def read(values, tmp_path, name="run"):
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values))
    return read_config(file)


def laid_over(values, **sections):
    for name, changes in sections.items():
        section = values.setdefault(name, {})
        section.update(changes)
    return values


def one_sided(given, expert, *, lora=False):
    """A DMD2 run of one expert, its teacher with both."""
    for role in ("student", "critic"):
        given["models"][role]["experts"] = [expert]
        if lora:
            given["models"][role] = {
                "base": "teacher", "experts": [expert], "lora": {"rank": 2},
            }  # fmt: skip
    # On the boundary's high side a rollout stays there; on the low one it begins with data.
    sampler = {"steps": 3, "timesteps": [1000, 900, 500], "stochastic": True}
    del given["validation"]
    return laid_over(
        given,
        method_config={
            "student_sampler": sampler, "rollout": "simulate" if expert == HIGH else "data",
        },
        checkpoint={
            "every_steps": 2, "resume": "latest",
            "export": [
                {"role": "student", "folder": "student", "verify": True},
                {"role": "student", "folder": "comfy", "format": "comfyui"},
                {"role": "student", "folder": "lora", "format": "lora", "verify": True}
                | ({} if lora else {"lora_rank": 2}),
            ],
        },
        callbacks={"ema": {"roles": ["student"], "decay": 0.5}},
    )  # fmt: skip


def stored(checkpoint):
    return {
        f"{file.relative_to(checkpoint)}/{name}": value
        for file in sorted(checkpoint.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


@pytest.mark.parametrize(
    ("expert", "lora"), [(HIGH, False), (LOW, True)], ids=["high-whole", "low-lora"]
)
def test_a_run_of_one_expert_resumes_and_is_exported(values, tmp_path, expert, lora):
    """Its checkpoint of iteration 4 is deleted and the file run again, from iteration 2."""
    config = read(one_sided(values("t2v-experts", "dmd2"), expert, lora=lora), tmp_path)
    (other,) = {HIGH, LOW} - {expert}
    plan = describe(config)
    models = plan[plan.index("\nmodels") : plan.index("\nmemory")]
    counted = [models.count(f"  {module}  ") for module in (expert, other)]
    assert counted == [3, 1], models
    assert "of which transformer" not in plan
    assert horizons(config, "student") == {expert: 2}  # all steps of the role are its own
    built = build(config, distribution=one_process())
    built.trainer.run(built.method, built.loader)
    assert [list(built.bundle[r].modules) for r in ("student", "critic")] == [[expert], [expert]]
    assert len(built.bundle["teacher"].modules) == 2
    out = tmp_path / "out"
    expected = stored(out / "checkpoint-000004")
    assert any(f"student/{expert}" in name or f"student.{expert}" in name for name in expected)
    assert not [name for name in expected if other == LOW and LOW in name]
    shutil.rmtree(out / "checkpoint-000004")
    run(config)
    resumed = stored(out / "checkpoint-000004")
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())

    file = "diffusion_pytorch_model.safetensors"
    source = config.roles["student"].spec.path
    for module, same in ((expert, False), (other, True)):
        old, new = (load_file(f"{folder}/{module}/{file}") for folder in (source, out / "student"))
        assert all(torch.equal(old[key], new[key]) for key in old) == same
    with pytest.raises(ConfigError, match="a clip takes both"):
        read_sample_source(out)
    assert read_sample_source(out / "student").roles["student"].spec.experts == ()
    end = "" if expert == HIGH else f"-{LOW}"
    assert (out / "comfy" / f"comfy{end}.safetensors").is_file()
    assert (out / "lora" / f"pytorch_lora_weights{end}.safetensors").is_file()


def losses(out):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k.startswith("loss/")} for line in lines]


@pytest.mark.parametrize("expert", [HIGH, LOW])
def test_its_losses_and_weights_are_those_of_a_run_of_both_at_its_times(values, tmp_path, expert):
    """Four iterations, whatever optimizer and schedule make of them; its teacher has one too, and
    the guidance of that one."""
    time = {"t_max": 870} if expert == LOW else {"t_min": 880}
    second = {"guidance_scale_2": 3.0} if expert == LOW else {}
    found, template = {}, values("t2v-experts")
    for name, experts in (("both", []), ("one", [expert])):
        given = copy.deepcopy(template)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        del given["validation"]
        path = given["models"]["student"]["path"]
        given["models"]["teacher"] = {"path": path, "experts": experts}
        given["models"]["student"]["experts"] = experts
        laid_over(
            given,
            recipe={"method": "teacher_only"},
            method_config={"time": time, "guidance_scale": 2.0, **second},
            training={"trackers": ["jsonl"], "log_every": 1},
            checkpoint={"every_steps": 4, "export": []},
        )
        given["training"]["optimizer"]["schedule"] = {"name": "cosine"}
        run(read(given, tmp_path))
        weights = stored(tmp_path / "out" / "checkpoint-000004")
        mine = {
            k: v for k, v in weights.items()
            if "student" in k and (LOW in k) == (expert == LOW)
        }  # fmt: skip
        found[name] = losses(tmp_path / "out"), mine
    assert len(found["one"][0]) == 4
    assert found["one"][0] == found["both"][0]
    assert found["one"][1].keys() == found["both"][1].keys()
    assert all(torch.equal(v, found["one"][1][k]) for k, v in found["both"][1].items())


# -- what cannot be -------------------------------------------------------------------------------


def _validated(given):
    given["validation"] = {"prompts": ["a seven"], "views": {"student": {"role": "student"}}}
    given["conditioning"] = {"negative_prompt": ""}


def _critic_elsewhere(given):
    given["models"]["critic"]["experts"] = [HIGH]


def _simulated(given):
    given["method_config"]["rollout"] = "simulate"


def _never(given):
    given["method_config"]["student_sampler"] = {"steps": 2, "timesteps": [1000, 900]}


def _self_forcing(given):
    given["recipe"]["method"] = "self_forcing"
    given["method_config"].pop("rollout")
    given["pipeline_config"]["causal"] = {"roles": ["student"], "chunk_frames": 1}
    for role in ("student", "critic"):
        given["models"][role]["experts"] = [HIGH]


def _consistency(given):
    given["recipe"]["method"] = "consistency"
    given["method_config"] = {}
    given["models"]["student"]["experts"] = [HIGH]
    del given["models"]["critic"]


def _beside_a_base_without_it(given):
    given["models"]["teacher"]["experts"] = [HIGH]
    given["models"]["student"] = {"base": "teacher", "experts": [LOW], "lora": {"rank": 2}}


def _twice(given):
    given["models"]["student"]["experts"] = [LOW, LOW]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_validated, "called at t from 0 to 875, and this sampler also takes t = 1000, 900"),
        (_critic_elsewhere, "'critic' has one of its model's experts, called at t from 875 to"),
        (_simulated, "and its rollouts call it at t = 1000, 900 too. Let the student begin with"),
        (_never, "called at t from 0 to 875, and this method_config calls student at no t of"),
        (_self_forcing, "called at t from 875 to 1000, and its rollouts call it at t = 0 too"),
        (_consistency, "which only the other one reaches"),
        (_beside_a_base_without_it, "transformer_2: 'teacher' has transformer alone"),
        (_twice, "names an expert twice"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_one_expert_cannot_do_is_a_problem_of_the_file(values, tmp_path, change, message):
    given = one_sided(values("t2v-experts", "dmd2"), LOW)
    read(given, tmp_path)
    change(given)
    with pytest.raises(ConfigError, match=message):
        read(given, tmp_path)


def test_a_checkpoint_of_one_expert_starts_no_role_of_both(values, tmp_path):
    given = one_sided(values("t2v-experts", "dmd2"), LOW)
    given["checkpoint"]["export"] = []
    run(read(given, tmp_path))
    checkpoint = tmp_path / "out" / "checkpoint-000004"
    given["training"]["output_dir"] = str(tmp_path / "next")
    given["models"]["student"]["init_from"] = {"path": str(checkpoint)}
    built = build(read(given, tmp_path, "next"), distribution=one_process())
    (source,) = StoredCheckpoint.open(checkpoint).weights("student").values()
    trained = source.read(source.describe())
    state = built.bundle["student"].modules[LOW].state_dict()
    assert trained.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in trained.items())
    given["models"]["student"]["experts"] = []
    given["method_config"]["rollout"] = "simulate"
    message = "holds student with transformer_2 alone, and student has all"
    with pytest.raises(ConfigError, match=message):
        read(given, tmp_path, "next")
