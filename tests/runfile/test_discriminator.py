"""Run files with a discriminator: right ones planned and resolved, wrong ones answered by line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from distill_protocols import ConfigError, DiscriminatorSpec
from distill_runfile.cli import EXIT_INCOMPLETE
from distill_runfile.read import read_config
from distill_train.cli import main
from distill_train.run import run

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny"
Values = dict[str, Any]


@pytest.fixture(name="gan")
def _gan(values: Values) -> Values:
    """Return the right run file with a discriminator on the teacher."""
    values["models"]["discriminator"] = {"heads": {"on": "teacher", "blocks": [1, 3], "width": 8}}
    values["method_config"] |= {"gan": {}, "generator_update_interval": 2}
    values["training"] |= {"max_train_steps": 2, "progress": False, "trackers": []}
    values["checkpoint"] = {}
    values["callbacks"] = {}
    return values


def only_problem(path: Path) -> str:
    """Return the only problem of the run file."""
    with pytest.raises(ConfigError) as excinfo:
        read_config(path)
    (reported,) = excinfo.value.problems
    return reported


def test_a_discriminator_inherits_options_of_its_role(gan, write):
    config = read_config(write(gan))
    spec = config.roles["discriminator"].spec
    assert spec.path == config.roles["teacher"].spec.path
    assert spec.heads == DiscriminatorSpec(on="teacher", blocks=(1, 3), width=8)
    assert spec.trainable
    assert spec.precision == "fp32"
    assert "path" not in config.resolved["models"]["discriminator"]
    again = yaml.safe_dump(config.resolved | {"validation": None}, sort_keys=False)
    assert read_config(write(again, "again.yaml")).roles == config.roles


def test_heads_on_a_lora_role_are_built_for_its_base(gan, write):
    gan["models"]["critic"] = {"base": "teacher", "lora": {"rank": 2}}
    gan["models"]["discriminator"]["heads"]["on"] = "critic"
    spec = read_config(write(gan)).roles["discriminator"].spec
    assert spec.path == str(TINY / "wan")


def test_a_plan_shows_heads_and_their_turns(gan, write, capsys):
    assert main(["--config", str(write(gan)), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (model,) = [line for line in lines if "heads of width 8" in line]
    one = (128 * 8 + 8) + 2 * (8 * 8 * 27 + 8 + 2 * 8) + 8 + 1
    assert f"{2 * one:,}  trained" in model
    assert "on teacher's blocks 1, 3" in model
    (turns,) = [line for line in lines if line.lstrip().startswith("discriminator (lr")]
    assert turns.split()[-11:-1] == ["x"] * 10


HEADS = {"on": "teacher", "blocks": [1], "width": 8}


@pytest.mark.parametrize(
    ("role", "changes", "expected"),
    [
        ("discriminator", {"heads": HEADS | {"on": "x"}}, "heads.on: 'x' must be a role"),
        ("discriminator", {"heads": HEADS | {"on": "student"}}, "heads.on: 'student' is not what"),
        ("discriminator", {"heads": HEADS | {"blocks": [1, 4]}}, "heads.blocks: block 4 must be"),
        ("discriminator", {"heads": HEADS | {"blocks": []}}, "heads.blocks: [] must name at"),
        ("discriminator", {"heads": HEADS | {"blocks": [1, 1]}}, "heads.blocks: [1, 1] must name"),
        ("discriminator", {"heads": HEADS | {"width": 0}}, "heads.width: 0 must be at least 1"),
        ("discriminator", {"path": "./wan"}, "path: has no place beside heads"),
        ("discriminator", {"base": "teacher"}, "base: has no place beside heads"),
        (
            "discriminator",
            {"attention_backend": "native"},
            "attention_backend: has no place beside heads",
        ),
        ("discriminator", {"lora": {"rank": 2}}, "lora: has no place beside heads"),
        ("discriminator", {"precision": "bf16"}, "precision: bf16 of heads"),
        ("discriminator", {"offload": True}, "offload: true, but 'discriminator' is trained"),
        ("discriminator", {"trainable": False}, "trainable: discriminator is frozen here"),
        ("discriminator", {"heads": None}, "heads: missing: dmd2 calls discriminator as"),
        ("teacher", {"compile": {}}, "discriminator.heads.on: 'teacher' has compile"),
        ("critic", {"path": None, "heads": HEADS}, "critic.heads: dmd2 calls critic as a model"),
    ],
)
def test_an_impossible_discriminator_is_a_problem(gan, write, role, changes, expected):
    for key, value in changes.items():
        if value is None:
            gan["models"][role].pop(key)
        else:
            gan["models"][role][key] = value
    reported = only_problem(write(gan))
    assert expected in reported, reported
    line = int(reported.split(":")[1])
    text = write(gan).read_text().splitlines()[line - 1]
    key = reported.split(": ")[1].split(".")
    assert any(part in text for part in key[1:]), (line, text)


def test_rules_between_gan_and_discriminator(gan, write):
    gan["method_config"]["gan"] = {"train_features": True}
    assert "'teacher' is not what dmd2 takes features of" in only_problem(write(gan))
    gan["models"]["discriminator"]["heads"]["on"] = "critic"
    assert read_config(write(gan)).roles
    del gan["method_config"]["gan"]
    with pytest.raises(ConfigError, match="dmd2 calls no role 'discriminator'"):
        read_config(write(gan))
    gan["method_config"]["f_divergence"] = "js"
    del gan["models"]["discriminator"]
    assert "method_config.f_divergence: js weights each sample" in only_problem(write(gan))


def test_a_causal_role_gives_no_features(gan, write):
    gan["pipeline_config"]["causal"] = {"roles": ["teacher"], "chunk_frames": 1}
    reported = only_problem(write(gan))
    assert "models.discriminator.heads.on: 'teacher' is causal" in reported


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"checkpoint": {"export": [{"role": "discriminator", "folder": "d"}]}},
         "checkpoint.export.0.role: 'discriminator' is a discriminator, and no other tool"),
        ({"validation": {"every_steps": 1, "prompts": ["x"],
                         "views": {"d": {"role": "discriminator"}}}},
         "validation.views.d.role: 'discriminator' is a discriminator, which makes no clips"),
    ],
)  # fmt: skip
def test_a_discriminator_is_neither_exported_nor_sampled(gan, write, section, expected):
    assert expected in only_problem(write(gan | section))


def test_another_runs_discriminator_to_start_from(gan, write, tmp_path):
    run(read_config(write(gan)))
    checkpoint = tmp_path / "out" / "checkpoint-000002"
    gan["training"]["output_dir"] = str(tmp_path / "second")
    role = gan["models"]["discriminator"]
    role["init_from"] = {"path": str(checkpoint)}
    run(read_config(write(gan)))

    gan["training"]["output_dir"] = str(tmp_path / "third")  # nothing there to go on from
    role["heads"]["width"] = 16
    reported = only_problem(write(gan))
    assert "holds discriminator as heads on blocks 1, 3 of width 8" in reported
    assert "discriminator is heads on blocks 1, 3 of width 16" in reported
    role["heads"]["width"] = 8
    role["init_from"] = {"path": str(checkpoint), "role": "critic"}
    assert "holds critic as a model, and discriminator is heads" in only_problem(write(gan))
    role["init_from"] = {"path": str(TINY / "wan")}
    assert "must be a checkpoint folder" in only_problem(write(gan))
    del role["init_from"]
    gan["models"]["critic"]["init_from"] = {"path": str(checkpoint), "role": "discriminator"}
    assert (
        "holds discriminator as heads on blocks 1, 3 of width 8, and critic is a model"
        in only_problem(write(gan))
    )


@pytest.mark.parametrize("name", ["ladd", "dmd2_gan"])
def test_suggestions_for_heads_have_only_their_options(name, capsys):
    file = TINY.parent / "wan" / f"{name}_1.3b.yaml"
    options = ["--dry-run", "--world-size", "16", "--device-memory", "30GB"]
    assert main(["--config", str(file), *options]) == EXIT_INCOMPLETE
    plan = capsys.readouterr().out
    assert "does not fit" in plan
    for key in ("precision", "activation_checkpointing", "fsdp.mixed_precision", "offload"):
        assert f"models.discriminator.{key}" not in plan
