"""One role out of a checkpoint, through the app: every format, and every wrong request."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import distill_checkpoint
import pytest
import torch
import yaml
from diffusers import WanPipeline
from distill_export.cli import main
from distill_runfile.cli import EXIT_INTERRUPTED
from distill_train.cli import main as train
from safetensors.torch import load_file

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny"
LAST = "checkpoint-000004"


def run_file(out: Path, **roles: dict[str, Any]) -> dict[str, Any]:
    """Four iterations of DMD2 on the tiny Wan; ``roles`` are keys laid over models'."""
    names = ("student", "teacher", "critic")
    return {
        "recipe": {"family": "wan", "method": "dmd2"},
        "models": {name: {"path": str(TINY / "wan"), **roles.get(name, {})} for name in names},
        "training": {
            "output_dir": str(out), "max_train_steps": 4, "global_batch_size": 2,
            "progress": False, "trackers": [], "optimizer": {"lr": 1e-3},
        },
        "data": {"path": str(TINY / "data")},
        "pipeline_config": {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 8},
        "method_config": {
            "generator_update_interval": 2, "real_score_guidance_scale": 1.5,
            "student_sampler": {"steps": 2, "timesteps": [1000, 700], "stochastic": True},
        },
        "callbacks": {"ema": {"roles": ["student"], "decay": 0.5}},
    }  # fmt: skip


def trained(folder: Path, **roles: dict[str, Any]) -> Path:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(run_file(folder / "out", **roles)))
    assert train(["--config", str(file)]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Output folder of a run that trains all weights."""
    return trained(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory) -> Path:
    """Output folder of a run whose student and critic are LoRA roles."""
    lora = {"lora": {"rank": 3, "alpha": 6}}
    return trained(tmp_path_factory.mktemp("lora"), student=lora, critic=lora)


def export(out: Path, to: Path, *more: str) -> int:
    return main(["--checkpoint", str(out), "--role", "student", "--to", str(to), *more])


def stored(out: Path, kind: str) -> dict[str, torch.Tensor]:
    return written(out / LAST / kind)


def written(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize("ema", [False, True])
def test_the_diffusers_folder_holds_what_the_checkpoint_holds(whole, tmp_path, capsys, ema):
    assert export(whole, tmp_path / "student", *["--ema"] * ema, "--verify") == 0
    assert "verified" in capsys.readouterr().out
    kind = "ema/student.transformer" if ema else "roles/student"
    expected = stored(whole, kind)
    expected.pop("ema.updates", None)
    actual = written(tmp_path / "student" / "transformer")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    text = (tmp_path / "student" / "sampler_spec.json").read_text()
    assert "/wan" not in text, "a path of this machine"
    spec = json.loads(text)
    assert spec["path"] == "wan"
    assert spec["sampler"]["timesteps"] == [1000, 700]
    pipe = WanPipeline.from_pretrained(tmp_path / "student")
    pipe.set_progress_bar_config(disable=True)
    frames = pipe("the digit three moving up", **spec["call"], output_type="np").frames[0]
    assert frames.shape == (9, 32, 32, 3)


@pytest.mark.parametrize("name", ["whole", "low_rank"])
@pytest.mark.parametrize("form", ["diffusers", "comfyui"])
def test_every_form_reads_back_alike(name, form, request, tmp_path, capsys):
    out = request.getfixturevalue(name)
    assert export(out, tmp_path / "x", "--format", form, "--verify", "--precision", "fp32") == 0
    assert "verified" in capsys.readouterr().out


def test_a_lora_role_is_written_as_it_was_trained(low_rank, tmp_path, capsys):
    assert export(low_rank, tmp_path / "x", "--format", "lora", "--verify") == 0
    expected = stored(low_rank, "roles/student")
    actual = load_file(tmp_path / "x" / "pytorch_lora_weights.safetensors")
    assert len(actual) == len(expected)
    for name, value in expected.items():
        # alpha / rank = 2 goes into B: diffusers then needs no word on it.
        factor = 2 if ".lora_B." in name else 1
        assert torch.equal(actual["transformer." + name.replace(".default", "")], factor * value)


def test_adapters_are_extracted_from_a_whole_role_with_their_error(whole, tmp_path, capsys):
    assert export(whole, tmp_path / "x", "--format", "lora", "--lora-rank", "8", "--verify") == 0
    printed = capsys.readouterr().out
    assert "the LoRA is an approximation of the difference to wan, off by" in printed
    assert "/wan" not in (tmp_path / "x" / "sampler_spec.json").read_text()
    spec = json.loads((tmp_path / "x" / "sampler_spec.json").read_text())
    assert 0 < spec["lora"]["transformer"]["relative_error"] < 1


def test_a_small_shard_size_gives_shards_with_an_index(whole, tmp_path):
    assert export(whole, tmp_path / "x", "--max-shard-gb", "0.001", "--verify") == 0
    folder = tmp_path / "x" / "transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2


def test_the_other_roles_may_be_gone(whole, tmp_path):
    """The run file in the checkpoint names a teacher whose folder was deleted since."""
    out = Path(shutil.copytree(whole / LAST, tmp_path / LAST))
    run = json.loads((out / "config.json").read_text())
    run["models"]["teacher"]["path"] = str(tmp_path / "deleted")
    config = tmp_path / "elsewhere.yaml"
    config.write_text(yaml.safe_dump(run))
    assert export(out, tmp_path / "x", "--config", str(config)) == 0


def test_a_run_file_that_cannot_be_used_names_the_way_out_once(whole, tmp_path, capsys):
    out = Path(shutil.copytree(whole / LAST, tmp_path / LAST))
    run = json.loads((out / "config.json").read_text())
    run["models"]["student"]["path"] = str(tmp_path / "deleted")
    (out / "config.json").write_text(json.dumps(run))
    hint = "The checkpoint's own run file cannot be used; name one with --config RUN.yaml"
    for more, hinted in ([], True), (["--config", str(out / "config.json")], False):
        assert export(out, tmp_path / "x", *more) == 2
        error = capsys.readouterr().err
        assert "models.student.path" in error
        assert (hint in error) == hinted


WRONG = {
    "no such role": (["--role", "studnt"], "--role"),
    "an average that nobody kept": (["--role", "critic", "--ema"], "--ema"),
    "adapters of a whole role without a rank": (["--format", "lora"], "--lora-rank"),
    "no checkpoint there": (["--checkpoint", "nowhere"], "--checkpoint"),
    "a run file that is not there": (["--config", "nowhere.yaml"], "nowhere.yaml"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_an_error_and_writes_nothing(case, whole, tmp_path, capsys):
    more, word = WRONG[case]
    assert export(whole, tmp_path / "x", *more) == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("option", ["--max-shard-gb", "--lora-rank"])
@pytest.mark.parametrize("value", ["0", "1e-12", "-1", "inf", "nan", "much"])
def test_an_argument_that_is_no_number_is_refused(option, value, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        export(tmp_path / "nowhere", tmp_path / "x", option, value)
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert f"argument {option}: {value!r} must be" in message
    assert "customary" in message


def test_a_folder_may_be_named_by_a_dot(whole, tmp_path, monkeypatch):
    (tmp_path / "mine" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine" / "sub")
    assert export(whole, Path("../../x/../comfy/."), "--format", "comfyui") == 0
    assert (tmp_path / "comfy" / "comfy.safetensors").is_file()


def test_a_damaged_checkpoint_is_refused(whole, tmp_path, capsys):
    out = Path(shutil.copytree(whole / LAST, tmp_path / LAST))
    file = next((out / "roles" / "student").rglob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    assert export(out, tmp_path / "x") == 1
    assert "sha256" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [out]


def test_a_checkpoint_without_its_list_is_refused(whole, tmp_path, capsys):
    out = Path(shutil.copytree(whole / LAST, tmp_path / LAST))
    (out / "loop.json").write_text("{")
    assert export(out, tmp_path / "x") == 2
    assert capsys.readouterr().err.startswith(f"--checkpoint: {out} cannot be read")


def test_an_existing_folder_that_is_no_export_stays(whole, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").write_text("years of work")
    assert export(whole, tmp_path / "x") == 1
    assert (tmp_path / "x" / "thesis.tex").read_text() == "years of work"


def test_a_checkpoint_deleted_while_it_is_chosen_is_skipped(whole, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole / LAST, out / "checkpoint-000003")
    shutil.copytree(whole / LAST, out / "checkpoint-000009")
    hold = distill_checkpoint.hold_checkpoint

    def beaten(folder: Path):
        if folder.name == "checkpoint-000009":
            shutil.rmtree(folder)
        return hold(folder)

    monkeypatch.setattr(distill_checkpoint, "hold_checkpoint", beaten)
    argv = ["--checkpoint", str(out), "--role", "student", "--to", str(tmp_path / "s")]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "checkpoint-000009 has been deleted since; taking the next" in printed
    assert "taking " + str(out / "checkpoint-000003") in printed
    assert (tmp_path / "s" / "sampler_spec.json").is_file()


def test_a_newest_checkpoint_without_a_manifest_is_refused(whole, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole / LAST, out / "checkpoint-000003")
    shutil.copytree(whole / LAST, out / "checkpoint-000009")
    (out / "checkpoint-000009" / "manifest.json").unlink()
    argv = ["--checkpoint", str(out), "--role", "student", "--to", str(tmp_path / "s")]
    assert main(argv) == 2
    assert "checkpoint-000009 is damaged" in capsys.readouterr().err


def test_ctrl_c_while_the_run_file_is_read_prints_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("distill_runfile.cli.hold_newest_checkpoint", interrupt)
    args = ["--checkpoint", str(tmp_path), "--role", "student", "--to", str(tmp_path / "to")]
    assert main(args) == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "interrupted: nothing was written\n"
