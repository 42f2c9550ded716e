"""Wrong run files: every problem at once, with file, line and a way out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from distill_protocols import ConfigError
from distill_runfile.plan import describe
from distill_runfile.read import read_config

Values = dict[str, Any]

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny"


def problems(path: Path, models_json: Path | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as excinfo:
        read_config(path, models_json)
    return excinfo.value.problems


def test_the_run_file_that_tests_change_is_valid(values, write):
    config = read_config(write(values))
    assert list(config.roles) == ["student", "teacher", "critic"]
    assert config.roles["critic"].optimizer.lr == 6e-4
    assert config.roles["student"].optimizer.lr == 3e-4
    assert config.roles["teacher"].optimizer is None
    assert config.roles["student"].optimizer.betas == (0.0, 0.99)


def test_a_wrong_base_gives_no_second_problem_at_its_lora(values, write):
    values["models"]["teacher"]["prec"] = "bf16"
    values["models"]["student"] = {"base": "teacher", "lora": {"rank": 2}}
    (problem,) = problems(write(values))
    assert "models.teacher.prec: unknown key" in problem


def test_the_batch_is_divided_by_the_processes_whatever_else_is_wrong(values, write):
    values["training"] |= {"seed": -1, "batch_size_per_device": 3}
    with pytest.raises(ConfigError, match=r"3 a device \* 2 device\(s\) = 6\).*Use a.* of 6"):
        read_config(write(values), world_size=2)


def test_roles_beside_one_base_take_what_they_do_not_say_from_it(values, write):
    values["models"]["teacher"] |= {"precision": "bf16", "fsdp": {"shard": False}}
    for name in ("student", "critic"):
        values["models"][name] = {"base": "teacher", "lora": {"rank": 2}}
    roles = read_config(write(values)).roles
    teacher = roles["teacher"].spec
    for name in ("student", "critic"):
        spec = roles[name].spec
        assert (spec.path, spec.precision, spec.fsdp) == (teacher.path, "bf16", teacher.fsdp)
        assert spec.base == "teacher"
        assert spec.trainable


@pytest.mark.parametrize(
    ("processes", "changes", "problem"),
    [
        (
            "3",
            {},
            "training.global_batch_size: global_batch_size 4 over 3 devices is 1.33 samples each",
        ),
        ("4", {"batch_size_per_device": 2}, "training.batch_size_per_device: 4 samples"),
        (
            "2",
            {"distributed": {"strategy": "none"}},
            "training.distributed.strategy: none, but there are 2 processes",
        ),
        (
            "4",
            {"distributed": {"strategy": "hsdp", "shard_size": 3}},
            "training.distributed.shard_size: 4 processes / 3",
        ),
        ("1", {"distributed": {"strategy": "fsdp2"}}, None),
        ("2", {"batch_size_per_device": 1}, None),
    ],
)
def test_the_file_is_compared_with_the_processes_that_torchrun_started(
    values, write, monkeypatch, processes, changes, problem
):
    monkeypatch.setenv("WORLD_SIZE", processes)
    values["training"] |= changes
    if problem is None:
        assert read_config(write(values)).roles
    else:
        (reported,) = problems(write(values))
        assert problem in reported


def test_several_teachers_are_roles_of_the_file(values, write):
    """One of them is the base of a LoRA role."""
    values["method_config"]["teachers"] = {
        "teacher": {"weight": 1.25, "guidance_scale": 2.0},
        "poor": {"weight": -0.25},
    }
    values["models"]["poor"] = {"path": values["models"]["teacher"]["path"]}
    values["models"]["student"] = {"base": "teacher", "lora": {"rank": 2}}
    config = read_config(write(values))
    assert [(n, r.spec.trainable) for n, r in config.roles.items()] == [
        ("student", True), ("teacher", False), ("critic", True), ("poor", False),
    ]  # fmt: skip
    assert config.resolved["method_config"]["teachers"]["poor"]["weight"] == -0.25
    assert dict(config.method.weighted_teachers) == {
        "teacher": (1.25, (2.0, 2.0)),
        "poor": (-0.25, (1.5, 1.5)),
    }
    assert "poor" in describe(config)


def test_a_teacher_that_is_no_role_is_named_where_the_roles_are(values, write):
    values["method_config"]["teachers"] = {"teacher": {"weight": 0.5}, "second": {"weight": 0.5}}
    path = write(values)
    (problem,) = problems(path)
    line = path.read_text().splitlines().index("models:") + 1
    assert problem.startswith(
        f"run.yaml:{line}: models.second: missing role; dmd2 calls student, te"
    )


def put(*path: str, value: Any) -> Callable[[Values], None]:
    def spoil(values: Values) -> None:
        for key in path[:-1]:
            values = values.setdefault(key, {})
        values[path[-1]] = value

    return spoil


def drop(*path: str) -> Callable[[Values], None]:
    def spoil(values: Values) -> None:
        for key in path[:-1]:
            values = values[key]
        del values[path[-1]]

    return spoil


def report(**changes: Any) -> Callable[[Values], None]:
    judge = Path(__file__).resolve().parents[2] / "configs" / "tiny" / "judge"
    right = {
        "judge": str(judge),
        "prompts": str(judge / "prompts.txt"),
        "sheet_prompts": ["the digit three moving up"],
        "entries": {"a": {"role": "student", "ema": True}},
    }
    return put("callbacks", "report", value=right | changes)


def lora_beside(base: str, **keys: Any) -> Callable[[Values], None]:
    """Return the student as a LoRA beside ``base``, with ``keys`` added."""
    role = {"base": base, "lora": {"rank": 2}} | keys
    return put("models", "student", value={k: v for k, v in role.items() if v is not None})


def view_called(name: str) -> Callable[[Values], None]:
    section = {"prompts": ["the digit one moving up"], "views": {name: {"role": "student"}}}
    return put("validation", value=section)


def export_to(*folders: str) -> Callable[[Values], None]:
    return put("checkpoint", "export", value=[{"role": "student", "folder": f} for f in folders])


def teachers(**terms: Any) -> Callable[[Values], None]:
    return put("method_config", "teachers", value=terms)


def together(*spoil: Callable[[Values], None]) -> Callable[[Values], None]:
    def all_of(values: Values) -> None:
        for each in spoil:
            each(values)

    return all_of


SPOILT = {
    "base that is no role": (lora_beside("tacher"), "models.student.base: 'tacher' must be another role of this file (there are: teacher, critic)"),
    "base of itself": (lora_beside("student"), "models.student.base: 'student' must be another role"),
    "base without lora": (lora_beside("teacher", lora=None), "models.student.base: a role beside another's weights needs lora"),
    "base and a path": (lora_beside("teacher", path="./x"), "models.student.path: with base: teacher it is that role's"),
    "base and a precision": (lora_beside("teacher", precision="bf16"), "models.student.precision: with base: teacher it is that role's"),
    "base that learns": (lora_beside("critic"), "models.student.base: 'critic' is trained, so its weights would move under the adapters"),
    "base that starts elsewhere": (
        together(lora_beside("teacher"), put("models", "teacher", "init_from", value={"path": "./x"})),
        "models.student.base: 'teacher' starts from",
    ),
    "offload of a role that learns": (put("models", "student", "offload", value=True), "models.student.offload: true, but 'student' is trained"),
    "offload of shards": (
        together(
            put("models", "teacher", "offload", value=True),
            put("training", "distributed", value={"strategy": "fsdp2"}),
        ),
        "models.teacher.offload: true, but 'teacher' is sharded",
    ),
    "offload under others": (
        together(lora_beside("teacher"), put("models", "teacher", "offload", value=True)),
        "models.teacher.offload: true, but student uses the same weights",
    ),
    "unknown key of a policy": (put("models", "teacher", "fsdp", value={"shards": True}), "models.teacher.fsdp.shards: unknown key; did you mean 'shard'?"),
    "unknown strategy": (put("training", "distributed", value={"strategy": "fsdp"}), "training.distributed.strategy: 'fsdp' must be one of"),
    "unknown key": (
        put("method_config", "generator_update_intervl", value=5),
        "method_config.generator_update_intervl: unknown key; did you mean 'generator_update_interval'?",
    ),
    "unknown section": (put("trainning", value={}), "trainning: unknown key; did you mean 'training'?"),
    "string for an integer": (
        put("training", "max_train_steps", value="many"),
        "training.max_train_steps: 'many' is a string, but must be an integer",
    ),
    "float for an integer": (put("training", "seed", value=2.7), "training.seed: 2.7 is a float, but must be an integer"),
    "boolean for a number": (put("callbacks", "ema", "decay", value=True), "callbacks.ema.decay: True is a boolean, but must be a number"),
    "list for a mapping": (put("training", value=[1]), "training: [1] is a list, but must be a mapping"),
    "missing section": (drop("data"), "data: missing section"),
    "Self-Forcing of a student that is not causal": (
        put("recipe", "method", value="self_forcing"),
        "recipe.method: self_forcing needs supports_kv_cache, causal:student, which family wan"),
    "frames of a rollout": (
        together(put("recipe", "method", value="self_forcing"),
                 put("pipeline_config", "causal", value={"roles": ["student"]}),
                 put("method_config", value={"rollout_frames": [9, 3]})),
        "method_config.rollout_frames: [9, 3] must be [min, max] latent frames"),
    "frames with gradient that hold no chunk": (
        together(put("recipe", "method", value="self_forcing"),
                 put("pipeline_config", "causal", value={"roles": ["student"], "chunk_frames": 3}),
                 put("method_config", value={"gradient_frames": 1})),
        "method_config.gradient_frames: 1 is less than the 3 latent frames of the last chunk"),
    "rollouts shorter than a clip": (
        together(put("recipe", "method", value="self_forcing"),
                 put("pipeline_config", "causal", value={"roles": ["student"], "chunk_frames": 2}),
                 put("method_config", value={"rollout_frames": [1, 2]})),
        "method_config.rollout_frames: [1, 2]: a rollout is made of whole chunks, which end at frames [2]"),
    "times by chunk of a student that is not causal": (
        together(put("recipe", "method", value="finetune"),
                 put("method_config", value={"times": "per_chunk", "past": "clean"}),
                 drop("models", "teacher"), drop("models", "critic")),
        "recipe.method: finetune needs supports_teacher_forcing, causal:student, which family wan"),
    "missing key": (drop("training", "output_dir"), "training.output_dir: missing; training needs it"),
    "missing role": (drop("models", "critic"), "models.critic: missing role; dmd2 calls student, teacher, critic"),
    "a role that nothing can stand in for": (
        drop("models", "critic"),
        "models.critic: missing role; dmd2 calls student, teacher, critic (critic: follows the distribution of the student's own clips (DMD's fake score)): the student learns from",
    ),
    "teacher that is left out of the teachers": (
        teachers(second={"weight": 1.0}),
        "models.teacher: dmd2 calls no role 'teacher'",
    ),
    "teacher that learns": (
        together(
            teachers(teacher={"weight": 0.5}, second={"weight": 0.5}),
            put("models", "second", value={"path": str(TINY / "wan"), "trainable": True}),
        ),
        "models.second.trainable: second is trainable here, but dmd2 never updates it",
    ),
    "teachers that weigh too much": (
        teachers(teacher={"weight": 1.5}),
        "method_config.teachers: the weights (teacher 1.5) add up to 1.5",
    ),
    "wrong key of a teacher": (
        teachers(teacher={"weight": 1.0, "guidance": 3.0}),
        "method_config.teachers.teacher.guidance: unknown key; did you mean 'guidance_scale'?",
    ),
    "guidance of a second expert that is not there": (
        put("method_config", "real_score_guidance_scale_2", value=3.0),
        "method_config.real_score_guidance_scale_2: 3 is the guidance of a second expert",
    ),
    "a teacher's guidance of a second expert that is not there": (
        teachers(teacher={"weight": 1.0, "guidance_scale_2": 3.0}),
        "method_config.teachers.teacher.guidance_scale_2: 3 is the guidance of a second expert",
    ),
    "misspelt role": (put("models", "critc", value={"path": "./x"}), "models.critc: dmd2 calls no role 'critc'; did you mean 'critic'?"),
    "trainable teacher": (put("models", "teacher", "trainable", value=True), "models.teacher.trainable: teacher is trainable here, but dmd2 never updates it"),
    "frozen student": (put("models", "student", "trainable", value=False), "models.student.trainable: student is frozen here, but dmd2 updates it"),
    "optimizer of a frozen role": (put("models", "teacher", "optimizer", value={"lr": 1.0}), "models.teacher.optimizer: role 'teacher' is frozen"),
    "wrong key in a role's optimizer": (put("models", "critic", "optimizer", value={"lrr": 1.0}), "models.critic.optimizer.lrr: unknown key; did you mean 'lr'?"),
    "unknown family": (put("recipe", "family", value="wann"), "recipe.family: unknown family 'wann'; did you mean 'wan'? (installed: "),
    "unknown method": (put("recipe", "method", value="dmd3"), "recipe.method: unknown method 'dmd3'; did you mean 'dmd2'? (installed: causal_consistency, "),
    "unknown callback": (put("callbacks", "emma", value={}), "callbacks.emma: unknown callback 'emma'; did you mean 'ema'?"),
    "another family for a role": (put("models", "critic", "family", value="hunyuan"), "models.critic.family: 'hunyuan' differs from recipe.family 'wan'"),
    "path that is no path": (put("models", "student", "path", value="wan"), "models.student.path: 'wan' is neither a folder"),
    "model folder that is not there": (put("models", "student", "path", value="./nowhere"), "models.student.path: "),
    "data folder that is not there": (put("data", "path", value="./nowhere"), "data.path: "),
    "value out of range": (put("method_config", "generator_update_interval", value=0), "method_config.generator_update_interval: 0 must be at least 1"),
    "value out of the options": (put("method_config", "rollout", value="simulat"), "method_config.rollout: 'simulat' must be one of 'simulate', 'data'; did you mean 'simulate'?"),
    "nested value": (put("method_config", "student_sampler", "shift", value=0), "method_config.student_sampler.shift: "),
    "batch that does not divide": (put("training", "batch_size_per_device", value=3), "training.batch_size_per_device: 4 samples"),
    "clip that the VAE cannot take": (put("pipeline_config", "num_frames", value=8), "pipeline_config.num_frames: 8 must be 4k + 1"),
    "causal role that is none": (
        put("pipeline_config", "causal", value={"roles": ["studnt"]}),
        "pipeline_config.causal.roles: there is no role 'studnt'; the run has critic, student, teacher",
    ),
    "latents of another shape": (put("pipeline_config", "num_frames", value=13), "data.path: "),
    "text of another length": (put("pipeline_config", "max_sequence_length", value=512), "data.path: "),
    "the data's folder for output": (lambda v: v["training"].update(output_dir=v["data"]["path"]), "training.output_dir: "),
    "checkpoint that is not there": (put("checkpoint", "resume", value="./checkpoint-000005"), "checkpoint.resume: there is no folder"),
    "role that never learns": (put("method_config", "generator_update_interval", value=400), "training.max_train_steps: 6 iterations hold no update of student"),
    "more steps than anyone takes": (put("training", "max_train_steps", value=10**27), "training.max_train_steps: "),
    "shift beside timesteps": (put("method_config", "student_sampler", "shift", value=3.0), "method_config.student_sampler.shift: 3.0 has no effect"),
    "prompt that names no digit": (report(sheet_prompts=["a red fox"], prompts=None), "callbacks.report.sheet_prompts: prompt 'a red fox'"),
    "metric that nobody offers": (report(metrics=["moton"]), "callbacks.report.metrics.0: unknown metric 'moton'; did you mean 'motion'"),
    "metric twice": (report(metrics=["motion", "motion"]), "callbacks.report.metrics.1: 'motion' stands twice"),
    "metrics that are a number": (report(metrics=3), "callbacks.report.metrics: 3 must be a list of names"),
    "metric that is no name": (report(metrics=[3]), "callbacks.report.metrics.0: 3 is an integer"),
    "option of a metric that it has not": (report(metrics={"motion": {"speed": 2}}), "callbacks.report.metrics.motion.speed: unknown key"),
    "metric without what it needs": (report(metrics=["likeness"]), "callbacks.report.metrics.likeness: it needs an entry to compare the others with"),
    "reference that is no entry": (report(reference="b"), "callbacks.report.reference: 'b' must be one of the entries (a)"),
    "real clips that are not there": (report(real_latents="./nowhere"), "callbacks.report.real_latents: there is no file"),
    "network of a package that is not there": (report(metrics={"frechet": {"networks": {"i": {"function": "nopackage.i:make", "weights": "./w", "reference": "./r"}}}}), "callbacks.report.metrics.frechet.networks.i.function: 'nopackage.i:make': no package 'nopackage'"),
    "FVD without its network": (report(metrics={"fvd": {"network": "./i3d.pt"}}, real_latents=str(Path(__file__))), "callbacks.report.metrics.fvd.network: there is no file"),
    "VBench that is not installed": (report(metrics=["vbench"]), "callbacks.report.metrics.vbench: the package vbench is not installed"),
    "entry that cannot be a folder": (report(entries={"a/b": {"role": "student"}}), "callbacks.report.entries: entry 'a/b' must be usable as a file name"),
    "prompts that are no text": (report(prompts=str(Path(__file__).resolve().parents[2] / "configs/tiny/judge/judge.safetensors")), "callbacks.report.prompts: "),
    "view of no role": (put("validation", value={"prompts": ["x"], "views": {"a": {"role": "studnt"}}}), "validation.views.a.role: there is no role 'studnt'"),
    "export of no role": (put("checkpoint", "export", value=[{"role": "studnt", "folder": "s"}]), "checkpoint.export.0.role: there is no role 'studnt'"),
    "average of no role": (put("callbacks", "ema", "roles", value=["student", "studnt"]), "callbacks.ema.roles: there is no role 'studnt'"),
    "average of a frozen role": (put("callbacks", "ema", "roles", value=["student", "teacher"]), "callbacks.ema.roles: 'teacher' is frozen"),
    "report of no role": (report(entries={"a": {"role": "studnt"}}), "callbacks.report.entries.a.role: there is no role 'studnt'"),
    "report of an average that nobody keeps": (report(entries={"a": {"role": "critic", "ema": True}}), "callbacks.report.entries.a.ema: no average of 'critic' is kept"),
    "judge that is not there": (report(judge="./nowhere"), "callbacks.report.judge: "),
    "empty output folder": (put("training", "output_dir", value=""), "training.output_dir: ''"),
    "adapters of rank 0": (put("models", "student", "lora", value={"rank": 0}), "models.student.lora.rank: 0 must be at least 1"),
    "adapters nowhere": (put("models", "student", "lora", value={"rank": 2, "target_modules": ["to_qq"]}), "models.student.lora.target_modules: 'to_qq' is the end of no linear layer's name"),
    "adapters that never move": (put("models", "teacher", "lora", value={"rank": 2}), "models.teacher.lora: role 'teacher' is frozen"),
    "start from nothing": (put("models", "student", "init_from", value={"path": "./nowhere"}), "models.student.init_from.path: "),
    "start from no path": (put("models", "student", "init_from", value={"path": "nowhere"}), "models.student.init_from.path: 'nowhere' is neither a folder"),
    "start from an average of a folder": (put("models", "student", "init_from", value={"path": str(Path(__file__).resolve().parents[2] / "configs/tiny/wan"), "ema": True}), "models.student.init_from.ema: "),
    "adapters of a whole role": (put("checkpoint", "export", value=[{"role": "student", "folder": "s", "format": "lora"}]), "checkpoint.export.0.lora_rank: "),
    "an unknown format": (put("checkpoint", "export", value=[{"role": "student", "folder": "s", "format": "comfy"}]), "checkpoint.export.0.format: 'comfy' is none of diffusers, lora, comfyui"),
    "best by what nobody measures": (lambda v: v["checkpoint"].update(every_steps=2, keep_best={"metric": "report/student/fd"}), "checkpoint.keep_best.metric: 'report/student/fd' is measured by no callback"),
    "best by what is measured at other times": (
        lambda v: (report(every_steps=4)(v), v["checkpoint"].update(every_steps=5, keep_best={"metric": "report/a/fd"})),
        "checkpoint.keep_best.metric: 'report/a/fd' is measured every 4 iterations and saves come every 5",
    ),
    "best by a metric of no method": (lambda v: v["checkpoint"].update(every_steps=2, keep_best={"metric": "fid"}), "checkpoint.keep_best.metric: 'fid' is measured by no callback of this file, and not by dmd2"),
    "best by a loss that is not so called": (lambda v: v["checkpoint"].update(every_steps=2, keep_best={"metric": "loss/critic"}), "checkpoint.keep_best.metric: 'loss/critic' is measured by no callback of this file, and not by dmd2; did you mean 'loss/critic_loss'?"),
    "best by a loss of other iterations": (
        lambda v: (
            v["training"].update(log_every=1),
            v["method_config"].update(critic_update="alternate", generator_update_interval=2),
            v["checkpoint"].update(every_steps=2, keep_best={"metric": "loss/critic_loss"}),
        ),
        "checkpoint.keep_best.metric: 'loss/critic_loss' is never measured in an iteration that is saved (every 2)",
    ),
    "best by a loss that is not logged when it is saved": (
        lambda v: (
            v["training"].update(log_every=4),
            v["checkpoint"].update(every_steps=3, keep_best={"metric": "loss/critic_loss"}),
        ),
        "checkpoint.keep_best.metric: 'loss/critic_loss' is never measured in an iteration that is saved (every 3)",
    ),
    "view that is no file name": (view_called("a" * 201), "validation.views: 'aaaaaaaaaaaaaaaaaaaa' ... is 201 bytes long and must have at most 200"),
    "export into a name that no disk takes": (export_to("s" * 300), "checkpoint.export.0.folder: 'ssssssssssssssssssss' ... is 300 bytes long"),
    "export into a NUL": (export_to("a/b\0"), "checkpoint.export.0.folder: cannot be read as str: 'a/b\\x00' holds a NUL character"),
    "exports inside each other": (export_to("a/b", "a"), "checkpoint.export: 'a/b' lies inside 'a', which is the folder of another export"),
    "output folder with a variable": (put("training", "output_dir", value="${OUT_DIR}/run1"), "training.output_dir: '${OUT_DIR}/run1' holds ${OUT_DIR}, and nothing is expanded in a run file"),
    "data with a variable": (put("data", "path", value="$DATA/clips"), "data.path: '$DATA/clips' holds $DATA, and nothing is expanded"),
    "model with a variable": (put("models", "teacher", "path", value="${MODELS}/wan"), "models.teacher.path: '${MODELS}/wan' holds ${MODELS}, and nothing is expanded"),
    "start with a variable": (put("models", "student", "init_from", value={"path": "./$RUN/checkpoint-000100"}), "models.student.init_from.path: './$RUN/checkpoint-000100' holds $RUN"),
    "components with a variable": (put("pipeline_config", "components", value="$VAE"), "pipeline_config.components: '$VAE' holds $VAE"),
    "pipeline of a variable": (put("pipeline_config", "pipeline_config_path", value="$HOME/wan.yaml"), "pipeline_config.pipeline_config_path: '$HOME/wan.yaml' holds $HOME"),
    "output of nobody": (put("training", "output_dir", value="~nobody-has-this-name/x"), "training.output_dir: '~nobody-has-this-name/x': there is no such user"),
    "output with a NUL": (put("training", "output_dir", value="./a\0b"), "training.output_dir: cannot be read as str: './a\\x00b' holds a NUL"),
    "output that no disk takes": (put("training", "output_dir", value="x" * 300), "training.output_dir: 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' ... has 300 bytes"),
    "more workers than anyone has": (put("data", "workers", value=1000), "data.workers: "),
    "gathered in another precision": (put("models", "teacher", "fsdp", value={"mixed_precision": "bf16"}), "models.teacher.fsdp.mixed_precision: bf16 must be the role's precision (fp32)"),
    "wrong key in a policy": (put("models", "teacher", "fsdp", value={"blcks": []}), "models.teacher.fsdp.blcks: unknown key; did you mean 'blocks'? (models.teacher.fsdp accepts: shard, "),
    "changes of an unknown kind": (put("checkpoint", "changes", value={"added": ["discriminator"]}), "checkpoint.changes.added: "),
    "average that nobody keeps": (drop("callbacks", "ema"), "checkpoint.export.0.ema: no average of 'student' is kept"),
}  # fmt: skip


@pytest.mark.parametrize(("key", "word"), [("family", "xyz"), ("method", "xyz")])
def test_an_uninstalled_plugin_is_named_with_its_package(values, write, key, word):
    values["recipe"][key] = word
    (problem,) = problems(write(values))
    assert f"recipe.{key}: unknown {key} '{word}' (installed: " in problem
    assert "pip install 'distill-train[all]'" in problem


def test_a_role_needs_a_model(values, write):
    values["models"]["student"] = {}
    (problem,) = problems(write(values))
    assert "models.student.path: missing: a folder" in problem


@pytest.mark.parametrize("case", SPOILT)
def test_a_problem_is_named_with_its_line(case, values, write):
    spoil, expected = SPOILT[case]
    spoil(values)
    path = write(values)
    reported = problems(path)
    assert any(f": {expected}" in problem for problem in reported), reported
    key = expected.split(":")[0].split(".")[-1]
    problem = next(f for f in reported if f": {expected}" in f)
    line = int(problem.split(":")[1])
    if any(text.strip().startswith(f"{key}:") for text in path.read_text().splitlines()):
        # YAML that safe_dump wrote has one key a line, so the line can be checked.
        assert path.read_text().splitlines()[line - 1].strip().startswith(f"{key}:")


def test_all_problems_of_a_file_come_at_once_in_the_order_of_the_file(values, write):
    for case in ("unknown key", "float for an integer", "trainable teacher", "unknown callback"):
        SPOILT[case][0](values)
    values["callbacks"]["ema"]["decay"] = 2.0
    reported = problems(write(values))
    assert len(reported) == 5
    lines = [int(problem.split(":")[1]) for problem in reported]
    assert lines == sorted(lines)


def test_one_broken_field_does_not_hide_a_rule_on_another(values, write):
    report()(values)
    values["training"] |= {"seed": "x", "max_train_steps": 0, "globl_batch_size": 1}
    reported = problems(write(values))
    assert len(reported) == 3, reported


def test_consequences_of_a_problem_are_not_reported(values, write):
    report(entries={"a": {"role": "student"}})(values)
    values["validation"] = {"prompts": ["x"], "views": {"a": {"role": "student"}}}
    values["method_config"]["generator_update_interval"] = 0
    (problem,) = problems(write(values))
    assert "method_config.generator_update_interval" in problem
    values["recipe"]["method"] = "dmd3"
    (problem,) = problems(write(values))
    assert "unknown method 'dmd3'" in problem
    values["recipe"]["method"] = "dmd2"
    values["method_config"]["generator_update_interval"] = 4
    values["models"]["student"]["precision"] = "fp8"
    (problem,) = problems(write(values))
    assert "models.student.precision" in problem
    values["models"]["student"]["precision"] = "fp32"
    values["callbacks"] = ["ema"]
    (problem,) = problems(write(values))
    assert "callbacks: ['ema'] must be a mapping" in problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the file is empty"),
        ("- a\n- b\n", "the file is a sequence"),
        ("recipe: {family: wan\ntraining: 1\n", "not valid YAML"),
        ("recipe:\n\tfamily: wan\n", "(indent with spaces)"),
        ("recipe: \0", "unprintable character #x0000"),
        ("models:\n  student: &a {path: *a}\n", "an alias (*name) stands inside"),
        ("recipe: {family: !!python/object/apply:os.system [ls]}", "the tag"),
    ],
)
def test_files_that_are_no_run_files_are_refused(text, expected, write):
    assert any(expected in problem for problem in problems(write(text)))


def test_no_file(tmp_path):
    (problem,) = problems(tmp_path / "absent.yaml")
    assert "there is no file" in problem


def test_duplicate_keys(values, write):
    text = yaml.safe_dump(values, sort_keys=False) + "data: {path: ./elsewhere}\n"
    reported = problems(write(text))
    assert any("data: written twice (first in line" in problem for problem in reported)


def test_scalars_follow_yaml_1_2(values, write):
    text = yaml.safe_dump(values, sort_keys=False)
    text = text.replace("lr: 0.0003", "lr: 3e-4").replace("negative_prompt", "negative_prompt")
    text += "conditioning: {negative_prompt: no}\n"
    config = read_config(write(text))
    assert config.training.optimizer.lr == 3e-4
    assert config.conditioning.negative_prompt == "no"


def test_anchors_and_merge_keys_work(values, write):
    del values["models"]
    path = yaml.safe_load(write(values).read_text())
    folder = str(Path(__file__).resolve().parents[2] / "configs" / "tiny" / "wan")
    text = yaml.safe_dump(path, sort_keys=False) + (
        f"models:\n  student: &m {{path: {folder}}}\n  teacher: *m\n"
        "  critic: {<<: *m, precision: bf16}\n"
    )
    config = read_config(write(text))
    assert config.roles["critic"].spec.precision == "bf16"
    assert config.roles["student"].spec.precision == "fp32"


def test_relative_paths_are_taken_from_the_file_and_not_from_the_shell(values, write, monkeypatch):
    values["training"]["output_dir"] = "runs/a"
    path = write(values)
    monkeypatch.chdir("/")
    assert read_config(path).training.output_dir == str(path.parent / "runs" / "a")


def test_models_json_is_laid_over_the_models_section(values, write, tmp_path):
    overlay = tmp_path / "models.json"
    overlay.write_text(
        json.dumps({"critic": {"precision": "bf16"}, "teacher": {"trainable": None}})
    )
    before = copy.deepcopy(values)
    config = read_config(write(values), overlay)
    assert config.roles["critic"].spec.precision == "bf16"
    assert config.roles["critic"].optimizer.lr == 6e-4
    assert values == before
    overlay.write_text('{"critic": {\n "precison": "bf16"}}')
    (problem,) = problems(write(values), overlay)
    assert problem.startswith("models.json:2: critic.precison: unknown key")


def test_a_guided_run_without_a_negative_condition_is_refused(values, write, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    source = Path(values["data"]["path"])
    for file in source.iterdir():
        if file.name != "constants.safetensors":
            (data / file.name).symlink_to(file)
    index = json.loads((source / "index.json").read_text())
    (data / "index.json").unlink()
    (data / "index.json").write_text(json.dumps(index | {"constants": None}))
    values["data"]["path"] = str(data)
    (problem,) = problems(write(values))
    assert "conditioning.negative_prompt: there is none" in problem
    assert "dmd2 guides a model" in problem
    values["conditioning"] = {"negative_prompt": ""}
    read_config(write(values))
    values["method_config"]["real_score_guidance_scale"] = 1.0
    del values["conditioning"]
    read_config(write(values))


def test_the_resolved_config_can_be_run_again_from_anywhere(values, write, tmp_path):
    first = read_config(write(values))
    resolved = dict(first.resolved)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "again.yaml").write_text(yaml.safe_dump(resolved))
    again = read_config(elsewhere / "again.yaml")
    assert again.resolved == first.resolved
    assert resolved["models"]["critic"]["optimizer"]["lr"] == 6e-4
    assert resolved["models"]["critic"]["trainable"] is True
    assert Path(resolved["models"]["teacher"]["path"]).is_absolute()
    # What a role does not have is not written, as an empty list of experts is none of its own.
    for role in resolved["models"].values():
        assert {"base", "heads", "experts"}.isdisjoint(role)


def plan_problems(values: Values, write: Callable[..., Path], model: str) -> tuple[str, ...]:
    """Return the problems of a dry run of ``values`` on a published model."""
    for role in values["models"].values():
        role["path"] = model
    values["pipeline_config"] = {"num_frames": 81, "height": 480, "width": 832}
    values["data"]["path"] = "/nowhere"
    values["conditioning"] = {"negative_prompt": ""}
    try:
        read_config(write(values), planning=True)
    except ConfigError as error:
        return error.problems
    return ()


def validation_of_the_teacher(**sampler: Any) -> Values:
    view = {"role": "teacher", "sampler": {"steps": 4, "guidance": 3.0, **sampler}}
    return {"prompts": ["x"], "views": {"a": view}}


def test_two_guidances_are_for_two_experts(values, write):
    values["validation"] = validation_of_the_teacher(guidance_2=2.0)
    assert plan_problems(copy.deepcopy(values), write, "Wan-AI/Wan2.2-T2V-A14B-Diffusers") == ()
    (problem,) = plan_problems(values, write, "Wan-AI/Wan2.1-T2V-14B-Diffusers")
    assert "validation.views.a.sampler.guidance_2: 2 is of a second expert" in problem


def test_prompts_alone_sample_no_image_to_video_model(values, write):
    model = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
    assert plan_problems(copy.deepcopy(values), write, model) == ()
    values["validation"] = validation_of_the_teacher()
    (problem,) = plan_problems(values, write, model)
    assert "validation.views.a.role: 'teacher' is an image-to-video model" in problem
    # TI2V takes a first frame or none.
    values["pipeline_config"] = {}
    assert plan_problems(values, write, "Wan-AI/Wan2.2-TI2V-5B-Diffusers") == ()


def test_an_export_may_not_take_the_place_of_something_else(values, write, tmp_path):
    folder = Path(values["training"]["output_dir"]) / "student"
    folder.mkdir(parents=True)
    assert read_config(write(values))  # an empty folder
    (folder / "thesis.tex").touch()
    (problem,) = problems(write(values))
    assert "checkpoint.export.0.folder: " in problem
    assert "already holds something that is no export" in problem
    (folder / "sampler_spec.json").touch()
    assert read_config(write(values))  # an older export


def test_checkpoints_can_be_kept_by_a_loss(values, write):
    """In an iteration of the student the critic's loss is the mean over those of the critic."""
    values["training"] |= {"log_every": 2}
    values["method_config"] |= {"critic_update": "alternate", "generator_update_interval": 2}
    for metric in ("loss/critic_loss", "loss/dmd_loss", "loss/total_loss", "score_distance"):
        values["checkpoint"] |= {"every_steps": 2, "keep_best": {"metric": metric}}
        assert read_config(write(values)).checkpoint.keep_best.metric == metric
