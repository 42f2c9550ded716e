"""FastVideo's and Self-Forcing's checkpoints become ours, bit for bit, or nothing is written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from distill_adapters_wan import PLUGIN
from distill_adapters_wan.names.fastvideo import from_diffusers
from distill_adapters_wan.names.original import to_original
from distill_checkpoint import StoredCheckpoint, migrate
from distill_protocols import CheckpointError, OutputError
from distill_runtime import files_below
from foreign_files import (
    Evil,
    Weights,
    rank_pieces,
    renamed,
    save_dcp,
    save_dcp_sharded,
    save_pt,
    save_transformer,
    training_state,
    wan_weights,
)
from safetensors.torch import load_file, save_file

CHECKPOINT = "checkpoint-400"


def theirs(weights: Weights) -> Weights:
    return renamed(weights, from_diffusers)


def wrapped(weights: Weights) -> Weights:
    """Rename weights as ``named_parameters`` does under activation checkpointing."""
    return {
        name.replace(".to_q.", "._checkpoint_wrapped_module.to_q."): value
        for name, value in weights.items()
    }


def turn(source: Path, tmp_path: Path, **options):
    return migrate(source, tmp_path / "ours", names=PLUGIN.foreign_names(), **options)


def refused(source: Path, tmp_path: Path, match: str, **options) -> None:
    before = set(files_below(tmp_path))
    with pytest.raises(CheckpointError, match=match):
        turn(source, tmp_path, **options)
    assert set(files_below(tmp_path)) == before
    assert not (tmp_path / "ours").exists()


def assert_holds(tmp_path: Path, expected: dict[str, Weights], iteration: int = 400) -> None:
    """Assert that the new checkpoint has exactly these ``kind/role/module``, bit for bit."""
    stored = StoredCheckpoint.open(tmp_path / "ours")
    assert stored.iteration == iteration
    loop = json.loads((tmp_path / "ours/loop.json").read_text())
    kinds = {"roles": "roles", "ema": "ema", "moments": "optimizers"}
    assert expected.keys() == {
        "/".join([kind, *part]) for kind, key in kinds.items() for part in loop[key]
    }
    for place, weights in expected.items():
        kind, role, module = place.split("/")
        if kind == "moments":
            [file] = (tmp_path / f"ours/optimizers/{role}.{module}").iterdir()
            read = load_file(file)
        else:
            source = stored.weights(role, ema=kind == "ema")[module]
            read = source.read(source.describe())
        assert read.keys() == weights.keys(), place
        for name, value in weights.items():
            assert read[name].dtype == value.dtype, name
            assert torch.equal(read[name], value), name


# -- legacy distillation --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def legacy_template(tmp_path_factory) -> Path:
    """Save two experts of three roles, as one rank does."""
    source = tmp_path_factory.mktemp("legacy") / CHECKPOINT
    for seed, role in enumerate(["generator", "critic", "generator_2", "critic_2", "real_score_2"]):
        state = training_state(theirs(wan_weights(seed)), seed)
        save_dcp(state, source / "distributed_checkpoint" / role)
    shared = {"random_state": {"torch_rng_state": torch.get_rng_state()}}
    save_dcp(shared, source / "distributed_checkpoint" / "shared")
    save_transformer(wan_weights(0), source / "generator_inference_transformer")
    return source


@pytest.fixture
def legacy(legacy_template, tmp_path) -> Path:
    """Copy the legacy checkpoint, so that a test may damage it."""
    return Path(shutil.copytree(legacy_template, tmp_path / CHECKPOINT))


LEGACY = {
    "roles/student/transformer": wan_weights(0),
    "roles/critic/transformer": wan_weights(1),
    "roles/student/transformer_2": wan_weights(2),
    "roles/critic/transformer_2": wan_weights(3),
    "roles/teacher/transformer_2": wan_weights(4),
}


def test_legacy_distillation(legacy, tmp_path):
    report = turn(legacy, tmp_path)
    assert_holds(tmp_path, LEGACY)
    assert len(report.taken) == 5
    assert report.layout == "a legacy distillation checkpoint"
    left = "\n".join(report.left)
    for word in (
        "student.transformer_2: optimizer moments", "generator: optimizer (", "scheduler",
        "dataloader", "random state", "generator_inference_transformer: again",
    ):  # fmt: skip
        assert word in left


def test_moments_are_kept_where_they_are_asked_for(tmp_path):
    state = training_state(theirs(wan_weights(0)), seed=5)
    save_dcp(state, tmp_path / CHECKPOINT / "distributed_checkpoint" / "generator")
    turn(tmp_path / CHECKPOINT, tmp_path, moments=True)
    moments = {
        f"{kind}.{name}": state["optimizer"][f"state.{from_diffusers(name)}.{kind}"]
        for kind in ("exp_avg", "exp_avg_sq")
        for name in wan_weights(0)
    }
    expected = {"roles/student/transformer": wan_weights(0), "moments/student/transformer": moments}
    assert_holds(tmp_path, expected)


def test_a_role_that_was_not_trained_has_no_weights_and_is_left(tmp_path):
    folder = tmp_path / CHECKPOINT / "distributed_checkpoint"
    save_dcp(training_state(theirs(wan_weights(0)), 0), folder / "generator")
    save_dcp({"dataloader": {"rank": 0}}, folder / "real_score_2")
    report = turn(tmp_path / CHECKPOINT, tmp_path)
    assert_holds(tmp_path, {"roles/student/transformer": wan_weights(0)})
    assert any("real_score_2: no weights in it" in line for line in report.left)


def test_bf16_and_image_to_video_and_its_unused_weight(tmp_path):
    weights = wan_weights(0, dtype=torch.bfloat16, image=True)
    saved = theirs(weights) | {"blocks.0.attn2.norm_added_q.weight": torch.ones(24)}
    save_dcp({"model": saved}, tmp_path / CHECKPOINT / "distributed_checkpoint" / "generator")
    turn(tmp_path / CHECKPOINT, tmp_path)
    assert_holds(tmp_path, {"roles/student/transformer": weights})


@pytest.mark.parametrize("ranks", [1, 4])
def test_averages_in_pieces_are_put_together(tmp_path, ranks):
    source = tmp_path / CHECKPOINT
    state = {"model": theirs(wan_weights(0, dtype=torch.bfloat16))}
    save_dcp(state, source / "distributed_checkpoint" / "generator")
    save_dcp(state, source / "distributed_checkpoint" / "generator_2")
    for number, seed in {"": 7, "_2": 8}.items():
        for rank, pieces in enumerate(rank_pieces(wrapped(theirs(wan_weights(seed))), ranks)):
            save_pt(pieces, source / "ema_local_shard" / f"generator_ema{number}_rank{rank}.pt")
    (source / "ema").mkdir()
    save_file(wan_weights(9), source / "ema" / "generator_ema.safetensors")
    report = turn(source, tmp_path)
    weights = wan_weights(0, dtype=torch.bfloat16)
    expected = {
        "roles/student/transformer": weights, "ema/student/transformer": wan_weights(7),
        "roles/student/transformer_2": weights, "ema/student/transformer_2": wan_weights(8),
    }  # fmt: skip
    assert_holds(tmp_path, expected)
    assert any("generator_ema.safetensors: again" in line for line in report.left)


@pytest.fixture
def replicated(tmp_path) -> Path:
    """Save two ranks that hold everything each (HSDP): their pieces do not add up."""
    source = tmp_path / CHECKPOINT
    save_dcp({"model": theirs(wan_weights(0))}, source / "distributed_checkpoint" / "generator")
    for rank in range(2):
        save_pt(theirs(wan_weights(7)), source / f"ema_local_shard/generator_ema_rank{rank}.pt")
    return source


def test_pieces_that_do_not_fit_give_way_to_the_whole_file(replicated, tmp_path):
    (replicated / "ema").mkdir()
    save_file(wan_weights(9), replicated / "ema" / "generator_ema.safetensors")
    report = turn(replicated, tmp_path)
    roles = {"roles/student/transformer": wan_weights(0)}
    assert_holds(tmp_path, {**roles, "ema/student/transformer": wan_weights(9)})
    assert any("generator_ema.safetensors is taken" in line for line in report.left)


def test_pieces_that_do_not_fit_are_refused_or_left_out(replicated, tmp_path):
    refused(replicated, tmp_path, r"the 2 files .* do not make up the average")
    report = turn(replicated, tmp_path, ema=False)
    assert_holds(tmp_path, {"roles/student/transformer": wan_weights(0)})
    assert "the average of student.transformer: not asked for" in report.left


def test_a_rank_that_is_missing_is_named(replicated, tmp_path):
    (replicated / "ema_local_shard/generator_ema_rank0.pt").unlink()
    refused(replicated, tmp_path, r"of ranks \[1\] only")


# -- the other layouts ----------------------------------------------------------------------------


def test_legacy_finetuning(tmp_path):
    state = training_state(theirs(wan_weights(0)), 0) | {"random_state": {"torch_rng_state": [1]}}
    save_dcp(state, tmp_path / CHECKPOINT / "distributed_checkpoint")
    save_transformer(wan_weights(0), tmp_path / CHECKPOINT / "transformer")
    report = turn(tmp_path / CHECKPOINT, tmp_path)
    assert_holds(tmp_path, {"roles/student/transformer": wan_weights(0)})
    assert any("random_state" in line for line in report.left)


def test_weights_only(tmp_path):
    source = tmp_path / f"{CHECKPOINT}_weight_only"
    save_transformer(wan_weights(0), source / "generator_inference_transformer")
    save_transformer(wan_weights(1), source / "generator_2_inference_transformer")
    save_pt(theirs(wan_weights(2)), source / "ema_local_shard" / "generator_ema_rank0.pt")
    (source / "ema").mkdir()
    save_file(wan_weights(3), source / "ema" / "generator_ema_2.safetensors")
    turn(source, tmp_path)
    expected = {
        "roles/student/transformer": wan_weights(0), "ema/student/transformer": wan_weights(2),
        "roles/student/transformer_2": wan_weights(1), "ema/student/transformer_2": wan_weights(3),
    }  # fmt: skip
    assert_holds(tmp_path, expected)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("ema_checkpoint-400", ""), ("ema_2_checkpoint-400", "_2"), ("transformer_2", "_2"),
        ("generator_2_inference_transformer", "_2"), ("wan_2.1_student", ""), ("run_2025", ""),
    ],
)  # fmt: skip
def test_one_transformers_folder(tmp_path, name, module):
    save_transformer(wan_weights(0), tmp_path / name)
    turn(tmp_path / name, tmp_path)
    expected = {f"roles/student/transformer{module}": wan_weights(0)}
    assert_holds(tmp_path, expected, iteration=400 if name.endswith("checkpoint-400") else 0)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_one_safetensors_file(tmp_path, prefix):
    """As ComfyUI has them."""
    weights = wan_weights(0)
    save_file({prefix + to_original(k): v for k, v in weights.items()}, tmp_path / "x.safetensors")
    assert turn(tmp_path / "x.safetensors", tmp_path).layout == "a transformer's file"
    assert_holds(tmp_path, {"roles/student/transformer": weights}, iteration=0)


def test_plain_fp8_is_refused(tmp_path):
    """Roles were trained from it without a word."""
    narrow = {name: value.to(torch.float8_e4m3fn) for name, value in wan_weights(0).items()}
    save_file(narrow, tmp_path / "x.safetensors")
    save_transformer(narrow, tmp_path / "transformer")
    for name in ("x.safetensors", "transformer"):
        refused(tmp_path / name, tmp_path, "F8_E4M3, which no model here has: it is quantised")


def test_a_type_that_no_weight_has_is_refused(tmp_path):
    save_transformer(wan_weights(0), tmp_path / "transformer")
    header = b'{"a":{"dtype":"F8_E8M0","shape":[8],"data_offsets":[0,8]}}'
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    refused(tmp_path / "transformer", tmp_path, "holds tensors of type F8_E8M0")


def newer_state(average: Weights | None, *, begun: bool = True) -> dict:
    state = {}
    for seed, role in enumerate(["student", "critic"]):
        kept = training_state(theirs(wan_weights(seed)), seed)
        state[f"roles.{role}.transformer"] = kept["model"]
        state[f"optimizers.{role}"] = {
            key.replace("state.", "state.transformer.", 1): value
            for key, value in kept["optimizer"].items()
        }
        state[f"schedulers.{role}"] = kept["scheduler"]
    state["dataloader"] = {"position": [1, 2]}
    if average is not None:
        state["callbacks"] = {"ema": {"student_ema": average, "ema_started": begun}}
    return state


def newer(tmp_path: Path, state: dict, *, ranks: int = 1) -> Path:
    source = tmp_path / CHECKPOINT
    source.mkdir(parents=True)
    config = {"method": {"_target_": "x.DMD2Method"}}
    (source / "metadata.json").write_text(json.dumps({"step": 399, "config": config}))
    if ranks == 1:
        save_dcp(state, source / "dcp")
    else:
        save_dcp_sharded(state, source / "dcp", ranks)
    save_pt({"torch_rng": torch.get_rng_state()}, source / "rng_state_rank0.pt")
    return source


NEWER = {"roles/student/transformer": wan_weights(0), "roles/critic/transformer": wan_weights(1)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_newer(tmp_path, ranks):
    average = wrapped(theirs(wan_weights(7)))
    report = turn(newer(tmp_path, newer_state(average), ranks=ranks), tmp_path)
    assert_holds(tmp_path, {**NEWER, "ema/student/transformer": wan_weights(7)}, iteration=399)
    written = json.loads((tmp_path / "ours/config.json").read_text())
    assert written["config"] == {"method": {"_target_": "x.DMD2Method"}}
    left = "\n".join(report.left)
    for word in ("optimizer moments", "schedulers", "dataloader", "rng_state_rank0.pt"):
        assert word in left


def test_a_pipe_among_the_files_does_not_block(tmp_path):
    source = newer(tmp_path, newer_state(None))
    [file] = (source / "dcp").glob("*.distcp")
    file.unlink()
    os.mkfifo(file)
    refused(source, tmp_path, "it is a folder or a pipe")


def test_an_average_that_had_not_begun_is_left_out(tmp_path):
    report = turn(newer(tmp_path, newer_state(theirs(wan_weights(7)), begun=False)), tmp_path)
    assert_holds(tmp_path, NEWER, iteration=399)
    assert any("it had not begun" in line for line in report.left)


def test_an_average_of_which_one_ranks_piece_was_kept_is_refused_or_left_out(tmp_path):
    source = newer(tmp_path, newer_state(rank_pieces(theirs(wan_weights(7)), 2)[0]))
    refused(source, tmp_path, "one rank's alone was kept")
    turn(source, tmp_path, ema=False)
    assert_holds(tmp_path, NEWER, iteration=399)


def self_forcing(weights: Weights) -> Weights:
    return {f"model.{to_original(name)}": value for name, value in weights.items()}


@pytest.mark.parametrize("names", [self_forcing, theirs, dict], ids=["original", "own", "ours"])
@pytest.mark.parametrize("flat", [True, False])
def test_ode_init(tmp_path, names, flat):
    weights = names(wan_weights(0, dtype=torch.bfloat16))
    save_pt(weights if flat else {"generator": weights}, tmp_path / "ode_init.pt")
    turn(tmp_path / "ode_init.pt", tmp_path)
    expected = {"roles/student/transformer": wan_weights(0, dtype=torch.bfloat16)}
    assert_holds(tmp_path, expected, iteration=0)


def test_a_file_of_several_roles(tmp_path):
    contents = {
        "generator": self_forcing(wan_weights(0)), "critic": self_forcing(wan_weights(1)),
        "generator_ema": self_forcing(wan_weights(2)), "step": 5,
    }  # fmt: skip
    save_pt(contents, tmp_path / "model.pt")
    report = turn(tmp_path / "model.pt", tmp_path)
    assert_holds(tmp_path, {**NEWER, "ema/student/transformer": wan_weights(2)}, iteration=0)
    assert report.left == ("step: no weights of a role",)


# -- what is refused ------------------------------------------------------------------------------


def with_model(tmp_path: Path, weights: Weights) -> Path:
    save_dcp({"model": weights}, tmp_path / CHECKPOINT / "distributed_checkpoint" / "generator")
    return tmp_path / CHECKPOINT


def test_a_name_that_wan_does_not_have_is_refused(tmp_path):
    extra = {"blocks.0.to_gate_compress.weight": torch.ones(2)}
    source = with_model(tmp_path, theirs(wan_weights(0)) | extra)
    refused(source, tmp_path, r"generator: blocks\.0\.to_gate_compress\.weight \(1 of")


def test_a_name_that_is_missing_is_refused(tmp_path):
    weights = theirs(wan_weights(0))
    del weights["blocks.1.ffn.fc_in.bias"]
    refused(with_model(tmp_path, weights), tmp_path, r"blocks\.1\.ffn\.net\.0\.proj\.bias")


def test_two_names_of_one_weight_are_refused(tmp_path):
    weights = theirs(wan_weights(0))
    weights["blocks.0.attn1.to_q.bias"] = weights["blocks.0.to_q.bias"]
    refused(with_model(tmp_path, weights), tmp_path, r"are both our blocks\.0\.attn1\.to_q\.bias")


def test_an_unknown_layout_lists_what_was_looked_for(legacy, tmp_path):
    (tmp_path / "empty").mkdir()
    looked = (
        r"metadata\.json, dcp/.*distributed_checkpoint/.*generator_inference_transformer/.*\.pt"
    )
    refused(tmp_path / "empty", tmp_path, looked)
    refused(tmp_path, tmp_path, f"such as .*{CHECKPOINT}")
    refused(tmp_path / "none", tmp_path, "does not exist")
    shutil.rmtree(legacy / "distributed_checkpoint")
    (legacy / "distributed_checkpoint").mkdir()
    shutil.rmtree(legacy / "generator_inference_transformer")
    refused(legacy, tmp_path, "no layout")


@pytest.mark.parametrize(
    "content",
    [
        [1], {"other": {"a": torch.ones(1)}}, {}, {"generator": 3},
        {"generator": theirs(wan_weights(0)), "generator_ema": torch.ones(2)},
    ],
)  # fmt: skip
def test_a_file_without_weights_is_refused(tmp_path, content):
    save_pt(content, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", tmp_path, r"x\.pt")


def test_a_target_that_is_there_is_not_touched(legacy, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine").write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        turn(legacy, tmp_path)
    assert (tmp_path / "ours" / "mine").read_text() == "precious"


@pytest.fixture
def evil(tmp_path) -> Evil:
    return Evil(tmp_path / "marker")


@pytest.mark.parametrize("where", ["file", "average", "metadata", "piece", "newer piece"])
def test_files_that_would_run_code_are_refused_and_nothing_is_written(
    legacy, tmp_path, evil, where
):
    source = legacy
    generator = legacy / "distributed_checkpoint" / "generator"
    if where == "file":
        source = tmp_path / "ode_init.pt"
        save_pt({"generator": self_forcing(wan_weights(0)), "x": evil}, source)
    elif where == "average":
        save_pt({"a": evil}, legacy / "ema_local_shard" / "generator_ema_rank0.pt")
    elif where == "metadata":
        (generator / ".metadata").write_bytes(pickle.dumps(evil))
    else:
        if where == "newer piece":
            source = newer(tmp_path / "newer_run", newer_state(None))
            generator = source / "dcp"
        [file] = generator.glob("*.distcp")
        save_pt(evil, tmp_path / "piece")
        content = (tmp_path / "piece").read_bytes()
        file.write_bytes(content + b"\0" * file.stat().st_size)
        point_to_the_beginning(generator, len(content))
    refused(source, tmp_path, "run any program")
    assert not evil.touched


def point_to_the_beginning(folder: Path, length: int) -> None:
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, length
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
