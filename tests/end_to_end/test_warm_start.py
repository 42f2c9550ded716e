"""models.<role>.init_from and models.<role>.lora, through the app."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from distill_adapters_wan.names.original import to_original
from distill_runfile.cli import EXIT_OK, EXIT_USAGE
from distill_train.cli import main
from safetensors.torch import load_file, save_file

QUIET = {"trackers": [], "progress": False}
RATE = {"lr": 1e-3, "schedule": {"name": "constant", "final_ratio": 0.0}}
STEP = {"max_train_steps": 1, **QUIET}
STILL = {"lr": 1e-30, "schedule": {"name": "constant", "warmup_steps": 0, "final_ratio": 0.0}}
"""A rate so small that fp32 rounds it away."""


def weights(checkpoint: Path, *parts: str) -> dict[str, torch.Tensor]:
    files = checkpoint.joinpath(*parts).rglob("*.safetensors")
    return {name: value for file in files for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, write_tiny) -> Path:
    """Finetune with an average; return the output folder."""
    folder = tmp_path_factory.mktemp("finetuned")
    config = write_tiny(
        folder,
        "finetune",
        training={"max_train_steps": 2, **QUIET},
        checkpoint={"export": [{"role": "student", "folder": "student"}]},
    )
    assert main(["--config", str(config)]) == EXIT_OK
    return folder / "out"


@pytest.fixture
def first_checkpoint(finetuned, tmp_path) -> Path:
    """Copy its output, so that a test may change it; return the checkpoint."""
    return Path(shutil.copytree(finetuned, tmp_path / "first")) / "checkpoint-000002"


def initial_weights(tiny, tmp_path, start: dict, **changes) -> dict[str, torch.Tensor]:
    """Return the student's weights after one step with a learning rate of 0."""
    config = tiny(
        "finetune",
        training={**STEP, "optimizer": STILL},
        models={"student": {"init_from": start}},
        checkpoint={"every_steps": None, "export": []},
        **changes,
    )  # fmt: skip
    assert main(["--config", str(config)]) == EXIT_OK
    return weights(tmp_path / "out" / "checkpoint-000001", "roles", "student")


@pytest.mark.parametrize("kind", ["live", "ema", "export", "comfyui"])
def test_a_role_starts_with_the_weights_of_init_from(kind, first_checkpoint, tiny, tmp_path):
    exported = weights(first_checkpoint.parent / "student" / "transformer")
    file = tmp_path / "comfyui.safetensors"
    save_file({f"model.diffusion_model.{to_original(k)}": v for k, v in exported.items()}, file)
    start, expected = {
        "comfyui": ({"path": str(file)}, weights(first_checkpoint, "roles", "student")),
        "live": ({"path": str(first_checkpoint)}, weights(first_checkpoint, "roles", "student")),
        "ema": ({"path": str(first_checkpoint), "ema": True}, weights(first_checkpoint, "ema")),
        "export": (
            {"path": str(first_checkpoint.parent / "student")},
            weights(first_checkpoint, "roles", "student"),
        ),
    }[kind]
    actual = initial_weights(tiny, tmp_path, start)
    assert all(torch.equal(actual[name], expected[name]) for name in actual)
    original = weights(Path("configs/tiny/wan/transformer").resolve())
    assert any(not torch.equal(actual[name], original[name]) for name in actual)


@pytest.mark.parametrize("kind", ["live", "export"])
def test_a_causal_student_starts_from_a_bidirectional_one(kind, first_checkpoint, tiny, tmp_path):
    """The weights are the same; what is causal is how they are called."""
    start = {"live": first_checkpoint, "export": first_checkpoint.parent / "student"}[kind]
    config = tiny(
        "self_forcing",
        training={**STEP, "max_train_steps": 4, "optimizer": STILL},
        models={"student": {"init_from": {"path": str(start)}}},
        checkpoint={"every_steps": None, "export": []},
        validation=None,
        callbacks={"report": None},
    )
    assert main(["--config", str(config)]) == EXIT_OK
    actual = weights(tmp_path / "out" / "checkpoint-000004", "roles", "student")
    expected = weights(first_checkpoint, "roles", "student")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_resumed_run_does_not_need_init_from(first_checkpoint, tiny, tmp_path):
    start = {"student": {"init_from": {"path": str(first_checkpoint)}}}
    config = tiny("finetune", training=STEP, models=start,
                  checkpoint={"every_steps": None, "export": []})  # fmt: skip
    assert main(["--config", str(config)]) == EXIT_OK
    shutil.rmtree(first_checkpoint.parent)
    longer = config.read_text().replace("max_train_steps: 1", "max_train_steps: 2")
    config.write_text(longer)
    assert main(["--config", str(config)]) == EXIT_OK


def test_wrong_init_from_is_a_problem_of_the_file(first_checkpoint, tiny, tmp_path, capsys):
    cases = {
        "first.parent": ({"path": str(first_checkpoint.parent)}, "checkpoint-000002"),
        "nowhere": ({"path": "./nowhere"}, "nowhere"),
        "role": ({"path": str(first_checkpoint), "role": "critic"}, "student"),
        "ema of a folder": (
            {"path": str(first_checkpoint.parent / "student"), "ema": True},
            "init_from.ema",
        ),
    }
    for start, word in cases.values():
        config = tiny("finetune", training=STEP, models={"student": {"init_from": start}})
        assert main(["--config", str(config)]) == EXIT_USAGE
        assert word in capsys.readouterr().err


def test_a_role_added_by_a_resumed_run_starts_with_init_from(first_checkpoint, tiny, tmp_path):
    config = tiny(
        "dmd2",
        training={**STEP, "max_train_steps": 6, "optimizer": STILL},
        models={"critic": {"optimizer": None,
                           "init_from": {"path": str(first_checkpoint), "role": "student"}}},
        checkpoint={"every_steps": None, "export": [], "resume": str(first_checkpoint),
                    "changes": {"added": ["roles.critic", "optimizers.student"],
                                "dropped": ["optimizers.student"]}},
        validation=None,
        callbacks={"report": None},
    )  # fmt: skip
    assert main(["--config", str(config)]) == EXIT_OK
    actual = weights(tmp_path / "out" / "checkpoint-000006", "roles", "critic")
    expected = weights(first_checkpoint, "roles", "student")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_start_that_would_be_called_or_merged_wrongly_is_refused(
    first_checkpoint, tiny, tmp_path, capsys
):
    def refusal(start: Path, **role) -> str:
        role = {"init_from": {"path": str(start)}, **role}
        config = tiny("finetune", training=STEP, models={"student": role},
                      checkpoint={"export": []})  # fmt: skip
        assert main(["--config", str(config)]) == EXIT_USAGE
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    exported = first_checkpoint.parent / "student"
    for start in (first_checkpoint, exported):
        # Exports know the base by its path: they would merge adapters into other weights.
        assert "but the base of student's lora is" in refusal(start, lora={"rank": 2})
    file = exported / "transformer" / "config.json"
    numbers = json.loads(file.read_text())
    # Half as many heads, twice as wide: every weight has the same shape.
    numbers["num_attention_heads"] //= 2
    numbers["attention_head_dim"] *= 2
    file.write_text(json.dumps(numbers))
    assert "num_attention_heads 2 instead of 4" in refusal(exported)
    (first_checkpoint / "config.json").write_text("{")
    assert "its config.json is missing or damaged" in refusal(first_checkpoint)


def test_a_lora_run_saves_adapters_alone_and_goes_on_bit_for_bit(tiny, tmp_path):
    lora = {"student": {"lora": {"rank": 2}}, "critic": {"lora": {"rank": 2}}}
    plain = {"validation": None, "checkpoint": {"export": []}}

    def run(out: str, steps: int) -> Path:
        config = tiny("dmd2", f"{out}.yaml", models=lora, callbacks={"report": None}, **plain,
                      training={"max_train_steps": steps, "output_dir": str(tmp_path / out),
                                "optimizer": RATE, **QUIET})  # fmt: skip
        assert main(["--config", str(config)]) == EXIT_OK
        return tmp_path / out / f"checkpoint-{steps:06d}"

    full = run("whole", 8)
    run("parts", 4)
    parts = run("parts", 8)
    actual, expected = weights(parts), weights(full)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    saved = weights(full, "roles", "student")
    assert saved
    assert all("lora_" in name for name in saved)
    assert any(value.any() for name, value in saved.items() if "lora_B" in name)


def test_adapters_start_from_adapters_of_the_same_scale_alone(tiny, tmp_path, capsys):
    def run(out: str, lora: dict, start: dict | None, **more) -> int:
        role = {"lora": lora, **({"init_from": start} if start else {})}
        training = {**STEP, "output_dir": str(tmp_path / out), "optimizer": {**RATE, **more}}
        config = tiny("finetune", f"{out}.yaml", models={"student": role},
                      training=training, checkpoint={"export": []})  # fmt: skip
        return main(["--config", str(config)])

    assert run("first", {"rank": 2, "alpha": 4}, None) == EXIT_OK
    first_checkpoint = tmp_path / "first" / "checkpoint-000001"
    assert (
        run("second", {"rank": 2, "alpha": 4}, {"path": str(first_checkpoint)}, lr=1e-30) == EXIT_OK
    )
    actual = weights(tmp_path / "second" / "checkpoint-000001", "roles", "student")
    expected = weights(first_checkpoint, "roles", "student")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    for other in ({"rank": 2, "alpha": 2}, {"rank": 4, "alpha": 8}):
        assert run("third", other, {"path": str(first_checkpoint)}) == EXIT_USAGE
        assert "holds adapters of 'student' alone, of rank 2 and alpha / rank 2" in (
            capsys.readouterr().err
        )
    assert not (tmp_path / "third").exists()
