"""Files that others pickled: read where they hold weights, refused where they would run code."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from distill_checkpoint.foreign.files import load_pt
from distill_checkpoint.foreign.safe_dcp import open_dcp
from distill_protocols import CheckpointError
from distill_runtime import files_below
from foreign_files import Evil, save_dcp, save_dcp_sharded
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import metadata as torch_metadata

STATE = {
    "model": {
        "a": torch.arange(12.0).reshape(4, 3),
        "half": torch.arange(6).to(torch.bfloat16).reshape(3, 2),
        "short": torch.ones(1, 5),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "whole": torch.arange(5),
    },
    "loader": {"position": 3, "names": ["a", "b"], "flag": False},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    save_dcp(STATE, tmp_path / "dcp")
    return tmp_path / "dcp"


@pytest.fixture
def evil(tmp_path) -> Evil:
    evil = Evil(tmp_path / "marker")
    evil.assert_runs_code()
    return evil


def assert_whole(folder: Path) -> None:
    saved = open_dcp(folder)
    for name, tensor in STATE["model"].items():
        read = saved.read([f"model.{name}"])[f"model.{name}"]
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
        info = saved.describe()[f"model.{name}"]
        assert (info.size, info.dtype) == (tuple(tensor.shape), tensor.dtype)
    assert saved.values == {"loader.position", "loader.names", "loader.flag"}
    assert saved.read_value("loader.position") == 3
    assert saved.read_value("loader.flag") is False


def test_one_ranks_checkpoint_is_read_bit_for_bit(folder):
    assert_whole(folder)


def test_pieces_of_three_ranks_are_put_together(tmp_path):
    """Four rows, three rows, one row and none over three ranks: some hold nothing."""
    save_dcp_sharded(STATE, tmp_path / "dcp", ranks=3)
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 3
    assert_whole(tmp_path / "dcp")


def test_only_the_pieces_asked_for_are_opened(folder):
    saved = open_dcp(folder)
    for file in folder.glob("*.distcp"):
        file.unlink()
    assert "model.a" in saved.describe()
    with pytest.raises(CheckpointError, match=r"model\.a is in it"):
        saved.read(["model.a"])


# -- pickles that run code ------------------------------------------------------------------------


def hand_written(marker: Path) -> dict[str, bytes]:
    """Write pickles by hand, one for each way of naming what is called."""
    touch = f"touch {marker}"
    string = b"\x8c" + bytes([len(touch)]) + touch.encode()

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    def called(module: str, name: str, arguments: bytes) -> bytes:
        return b"\x80\x04" + text(module) + text(name) + b"\x93" + arguments + b"\x85R."

    code = text(f"open({str(marker)!r}, 'w').close()")
    return {
        "global": f"cos\nsystem\n(S'{touch}'\ntR.".encode(),
        "inst": f"(S'{touch}'\nios\nsystem\n.".encode(),
        "obj": f"(cos\nsystem\nS'{touch}'\no.".encode(),
        "stack global": called("os", "system", string),
        "posix": called("posix", "system", string),
        "eval": called("builtins", "eval", code),
        "exec": called("builtins", "exec", code),
        "dotted": called("torch", "serialization.os.system", string),
        "through an allowed module": called(
            "torch.distributed.checkpoint.filesystem", "os.system", string
        ),
        "class of an allowed name": called("torch", "Size.__class__", string),
        "torch's own loader": called("torch", "load", string),
        "getattr": called("builtins", "getattr", string),
        "after a metadata": b"\x80\x04"
        + text("torch.distributed.checkpoint.metadata")
        + text("Metadata")
        + b"\x93)\x81}(" + text("state_dict_metadata") + text("os") + text("system") + b"\x93"
        + string + b"\x85Rub.",
    }  # fmt: skip


KINDS = list(hand_written(Path("x")))


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_that_would_run_code_is_refused(folder, evil, kind):
    content = hand_written(evil.marker)[kind]
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata was not read: .* run any program"):
        open_dcp(folder)
    assert not evil.touched


def test_the_evil_files_would_run_code_if_unpickled(evil):
    """The pickles above are no straw men (but for the two that torch's own would refuse too)."""
    for kind, content in hand_written(evil.marker).items():
        if kind in ("class of an allowed name", "torch's own loader", "getattr"):
            continue
        try:
            pickle.loads(content)
        finally:
            assert evil.touched, kind
            evil.marker.unlink()


def test_an_evil_object_in_valid_metadata_is_refused(folder, evil):
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    metadata.planner_data = {"model.a": evil}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        open_dcp(folder)
    assert not evil.touched


def test_unpickling_touches_no_class_of_torch(folder):
    """BUILD on a class would set its attributes; the stand-ins take that away."""
    text = b"\x8c\x04size"
    module, name = b"torch.distributed.checkpoint.metadata", b"TensorStorageMetadata"
    build = (
        b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name
        + b"\x93N}" + text + b"K\x01s\x86b."
    )  # fmt: skip
    pickle.loads(build)
    assert torch_metadata.TensorStorageMetadata.size == 1
    del torch_metadata.TensorStorageMetadata.size
    (folder / ".metadata").write_bytes(build)
    with pytest.raises(CheckpointError):
        open_dcp(folder)
    assert not hasattr(torch_metadata.TensorStorageMetadata, "size")


def replace_piece(folder: Path, name: str, content: bytes) -> None:
    """Append ``content`` to a file of pieces and let ``.metadata`` point there."""
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    index = next(index for index in metadata.storage_data if index.fqn == name)
    place = metadata.storage_data[index]
    file = folder / place.relative_path
    place.offset, place.length = file.stat().st_size, len(content)
    with file.open("ab") as stream:
        stream.write(content)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def as_pt(value: object, tmp_path: Path, *, zipped: bool = True) -> bytes:
    file = tmp_path / "piece.pt"
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.read_bytes()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_piece_that_would_run_code_is_refused(folder, evil, tmp_path, zipped):
    replace_piece(folder, "model.a", as_pt(evil, tmp_path, zipped=zipped))
    saved = open_dcp(folder)
    with pytest.raises(CheckpointError, match=r"distcp \(model\.a\) was not read: .*system"):
        saved.read(["model.a"])
    assert not evil.touched


def test_a_value_that_would_run_code_is_refused(folder, evil, tmp_path):
    replace_piece(folder, "loader.position", as_pt(evil, tmp_path))
    with pytest.raises(CheckpointError, match=r"loader\.position\) was not read"):
        open_dcp(folder).read_value("loader.position")
    assert_tensors_read = open_dcp(folder).read(["model.a"])
    assert torch.equal(assert_tensors_read["model.a"], STATE["model"]["a"])
    assert not evil.touched


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["top", "beside weights", "inside a list"])
def test_a_pt_file_that_would_run_code_is_refused(evil, tmp_path, where, zipped):
    weights = {"a": torch.ones(2)}
    contents = {"top": evil, "beside weights": {"generator": weights, "x": evil}}
    value = contents.get(where, {"generator": [weights, [evil]]})
    torch.save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"x\.pt was not read: .*(posix|os)\.system"):
        load_pt(tmp_path / "x.pt")
    assert not evil.touched


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", KINDS)
def test_a_bare_pickle_named_pt_is_refused(evil, tmp_path, kind):
    (tmp_path / "x.pt").write_bytes(hand_written(evil.marker)[kind])
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        load_pt(tmp_path / "x.pt")
    assert not evil.touched


def test_an_environment_variable_does_not_allow_unpickling(evil, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(evil, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="was not read"):
        load_pt(tmp_path / "x.pt")
    assert not evil.touched


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused(tmp_path):
    @torch.jit.script
    def program(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    program.save(str(tmp_path / "x.pt"))
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        load_pt(tmp_path / "x.pt")


# -- damage ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"PK\x03\x04", b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x04."],
    ids=["empty", "text", "zip", "lfs", "no value"],
)
def test_a_pt_file_that_is_no_pickle_is_an_error_with_its_name(folder, content, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt holds no weights"):
        load_pt(tmp_path / "x.pt")
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        open_dcp(folder)


def test_missing_and_unreadable_files_are_errors(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(CheckpointError, match=str(path)):
            load_pt(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_dcp(tmp_path)


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("flipped") / "dcp"
    save_dcp(STATE, folder)
    return folder, (folder / ".metadata").read_bytes()


@given(st.data())
def test_damaged_metadata_is_read_right_or_refused(content, data):
    """Any changed byte gives one of our errors, or tensors of the stated sizes."""
    folder, full = content
    place = data.draw(st.integers(0, len(full) - 1))
    changed = bytearray(full)
    changed[place] ^= data.draw(st.integers(1, 255))
    (folder / ".metadata").write_bytes(changed[: data.draw(st.sampled_from([len(full), place]))])
    with contextlib.suppress(CheckpointError):
        saved = open_dcp(folder)
        for name, info in saved.describe().items():
            assert tuple(saved.read([name])[name].shape) == info.size


def altered(folder: Path, change) -> None:
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def lengthen(metadata):
    entry = metadata.state_dict_metadata["model.a"]
    entry.size = torch.Size([5, 3])


def overlap(metadata):
    chunks = metadata.state_dict_metadata["model.a"].chunks
    chunks.append(torch_metadata.ChunkStorageMetadata(torch.Size([3, 0]), torch.Size([1, 3])))


def stick_out(metadata):
    metadata.state_dict_metadata["model.a"].size = torch.Size([3, 4])


def leave_the_folder(metadata):
    for place in metadata.storage_data.values():
        place.relative_path = f"../{place.relative_path}"


def compress(metadata):
    for place in metadata.storage_data.values():
        place.transform_descriptors = ["zstd"]


@pytest.mark.parametrize("change", [lengthen, overlap, stick_out, leave_the_folder, compress])
def test_metadata_that_contradicts_itself_is_refused(folder, change):
    altered(folder, change)
    with pytest.raises(CheckpointError, match="does not describe a checkpoint"):
        open_dcp(folder)


def test_pieces_of_another_checkpoint_are_refused(folder, tmp_path):
    replace_piece(folder, "model.a", as_pt(torch.ones(3, 4), tmp_path))
    with pytest.raises(CheckpointError, match="is of another checkpoint"):
        open_dcp(folder).read(["model.a"])
    replace_piece(folder, "model.a", as_pt(torch.ones(4, 3).half(), tmp_path))
    with pytest.raises(CheckpointError, match="is of another checkpoint"):
        open_dcp(folder).read(["model.a"])


def test_a_file_cut_short_is_refused(folder):
    [file] = folder.glob("*.distcp")
    os.truncate(file, file.stat().st_size - 1)
    saved = open_dcp(folder)
    with pytest.raises(CheckpointError, match="cut short"):
        saved.read(saved.describe())


def test_reading_writes_nothing(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    open_dcp(folder).read(["model.a"])
    assert {n: (folder / n).read_bytes() for n in files_below(folder)} == {
        n: (copy / n).read_bytes() for n in files_below(copy)
    }
