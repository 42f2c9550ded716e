"""Files and folders of the runtime: whole or not at all, and read without trust."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from distill_protocols import ContractError, TensorInfo
from distill_runtime import (
    DELETED_PREFIX,
    FileInfo,
    UnreadableFileError,
    json_files,
    open_file,
    path_inside,
    printable,
    publish_folder,
    read_header,
    read_json,
    remove_folder,
    replace_folder,
    sha256_of_file,
    write_new_file,
    write_safetensors,
)
from safetensors.torch import load_file

NESTED = b"[" * 200_000


def test_a_new_file_is_described_as_it_is(tmp_path):
    info = write_new_file(tmp_path / "a.json", b"{}\n")
    assert info == FileInfo(size=3, sha256=hashlib.sha256(b"{}\n").hexdigest())
    assert sha256_of_file(tmp_path / "a.json") == info.sha256
    with pytest.raises(FileExistsError):
        write_new_file(tmp_path / "a.json", b"[]\n")
    assert (tmp_path / "a.json").read_bytes() == b"{}\n"


def test_a_new_file_waits_for_the_disk(tmp_path, monkeypatch):
    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        write_new_file(tmp_path / "a", b"x")


@pytest.mark.parametrize("files_are_synced", [True, False])
def test_a_published_folder_replaces_another(tmp_path, monkeypatch, files_are_synced):
    synced: list[Path] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    stage, target, aside = tmp_path / "stage", tmp_path / "target", tmp_path / ".aside"
    for folder, content in ((stage, "new"), (target, "old")):
        (folder / "in").mkdir(parents=True)
        (folder / "in" / "file").write_text(content)
    monkeypatch.setattr(os, "fsync", fsync)
    publish_folder(stage, target, aside=aside, files_are_synced=files_are_synced)
    assert (target / "in" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    files = [] if files_are_synced else [stage / "in" / "file"]
    # The names in a folder before the folder's own, and the new name last.
    assert synced == [*files, stage / "in", stage, tmp_path]


def test_a_killed_replacement_keeps_the_old_folder_under_another_name(tmp_path, monkeypatch):
    stage, target, aside = tmp_path / "stage", tmp_path / "target", tmp_path / ".aside"
    stage.mkdir()
    target.mkdir()
    (target / "kept").write_text("")
    real = Path.rename

    def rename(path: Path, to: Path) -> Path:
        if path == stage:
            raise KeyboardInterrupt  # as a kill: nothing is cleared up behind it
        return real(path, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        publish_folder(stage, target, aside=aside)
    assert (aside / "kept").exists()
    assert not target.exists()


def test_a_folder_is_removed_under_a_dot_name(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    remove_folder(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == [f"{DELETED_PREFIX}a"]


# -- read without trust ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (NESTED, "nested too deeply"),
        (b'{"a": ' + NESTED, "nested too deeply"),
        (b"{", "is no JSON"),
        (b"\xff\xfe{", "is no UTF-8 text"),
        (b"{}".decode().encode("utf-16"), "is no UTF-8 text"),  # json.loads takes it
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b"1" * 5000, r"5000 digits; at most 40 are read \(line 1\)"),
        (b'{"a":\n' + b"1" * 41 + b"}", r"41 digits; at most 40 are read \(line 2\)"),
        (b"NaN", "NaN is no JSON number"),
        (b"[-Infinity]", "-Infinity is no JSON number"),
        (b"1e999", "larger than a float can be"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' stands twice"),
        (b'["\\ud800"]', "half of a UTF-16 pair"),
        (b'{"\\udc00": 1}', "half of a UTF-16 pair"),
        (b"[" * 101 + b"]" * 101, "nested too deeply"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "nested too deeply"),
        (b'"\\"' * 60_000 + b"\\", "is no JSON"),  # in linear time
        (b'{"a": ' + b'"\\""' * 60_000, "is no JSON"),
    ],
)
def test_json_that_is_none(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UnreadableFileError, match=message):
        read_json(tmp_path / "a.json")


def test_json_at_its_limits_is_read(tmp_path):
    text = '{"a": "[[[{{{\\\\", "b": "\\ud83e\\udd8a", "n": ' + "9" * 40 + ', "l": '
    (tmp_path / "a.json").write_text(text + "[" * 99 + "]" * 99 + "}")
    value = read_json(tmp_path / "a.json")
    assert value["a"] == "[[[{{{\\"
    assert value["b"] == "\N{FOX FACE}"
    assert value["n"] == 10**40 - 1
    brackets = json.dumps(["[" * 300, '"' * 300, "\\" * 301])  # of text alone
    (tmp_path / "a.json").write_text(brackets)
    assert read_json(tmp_path / "a.json") == json.loads(brackets)


def test_json_of_too_many_values_is_refused_before_it_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_NODES", 100)
    monkeypatch.setattr(json_files, "_DECODER", None)
    for text in ("[" + "0," * 100 + "0]", "[" + "[]," * 60 + "[]]"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UnreadableFileError, match="more than 100 values"):
            read_json(tmp_path / "a.json")


def test_reading_a_pipe_or_device_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "itself").symlink_to("itself")
    for name in ("pipe", "", "itself", "missing", "a\0b", "a" * 300):
        for read in (read_json, read_header):
            with pytest.raises(UnreadableFileError):
                read(tmp_path / name)
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="no regular file"):
            open_file(path)
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/etc/passwd", "..", "", "a\0b", "a" * 256, "\ud800", "~root/x",
     "a\\..\\b", 3, None, ["x"]],
)  # fmt: skip
def test_paths_in_files_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(UnreadableFileError, match=r"index\.json names"):
        path_inside(tmp_path, name, tmp_path / "index.json")


def test_a_name_beside_or_below_is_taken(tmp_path):
    for name in ("a.safetensors", "b/c.safetensors", "..a", "a b"):
        assert path_inside(tmp_path, name, "x") == tmp_path / name


def test_text_from_files_is_escaped():
    hostile = "a\x1b[2J\r\x07\x9b1m\u202eb\u2028\ud800\u200bc"
    assert printable(hostile) == r"a\x1b[2J\r\x07\x9b1m\u202eb\u2028\ud800\u200bc"
    fine = "one\n\ttwo \N{FOX FACE} \u3042\u3000\xe9"
    assert printable(fine) == fine
    assert printable("a\nb\tc", one_line=True) == r"a\nb\tc"


def test_json_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "a.json").write_text("[]" * 10)
    with pytest.raises(UnreadableFileError, match="20 bytes; more than 19"):
        read_json(tmp_path / "a.json", max_bytes=19)
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(256 * 2**20 + 1)  # a hole, which takes no disk
    with pytest.raises(UnreadableFileError, match="268435457 bytes; more than 268435456"):
        read_json(tmp_path / "a.json")


def header_file(path: Path, header: bytes, numbers: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + numbers)
    return path


def entry(**changes: object) -> bytes:
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return json.dumps({"a": {**good, **changes}}).encode()


def test_a_header_is_read(tmp_path):
    header = read_header(header_file(tmp_path / "a", entry(), bytes(8)))
    assert header.tensors == {"a": ("F32", (2,), 0, 8)}


@pytest.mark.parametrize(
    "header",
    [
        NESTED,
        b"[]",
        b"3",
        b'{"a": []}',
        b'{"__metadata__": 3}',
        entry(shape=None),
        entry(shape=[float("inf")]),
        entry(shape=[-2]),
        entry(shape=[10**30]),
        entry(shape=[2.0]),
        entry(shape=["2"]),
        entry(shape=[True, 2]),
        entry(shape=[1] * 64 + [2]),
        entry(data_offsets=[0.0, 8.0]),
        entry(data_offsets=[0, 8, 8]),
        entry(dtype=["F32"]),
        b'{"__metadata__": {"a": 3}}',
        entry()[:-1] + b', "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        entry()[:-1] + b', "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        entry()[:-1] + b', "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        entry(data_offsets=[8, 16]),
        entry(data_offsets=[0, float("inf")]),
        entry(data_offsets=[float("nan"), 8]),
        entry(data_offsets=[8, 0]),
        entry(data_offsets=[0]),
    ],
)
def test_a_damaged_header_is_one_error(tmp_path, header):
    with pytest.raises(UnreadableFileError):
        read_header(header_file(tmp_path / "a", header, bytes(8)))


@pytest.mark.parametrize("size", [0, 7, 12])
def test_a_file_cut_short_has_no_header(tmp_path, size):
    path = header_file(tmp_path / "a", entry(), bytes(8))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UnreadableFileError, match="no whole safetensors file"):
        read_header(path)


# -- written tensor by tensor ---------------------------------------------------------------------


def test_a_safetensors_file_is_described_as_it_is(tmp_path):
    tensors = {"a": torch.rand(3, 5), "b": torch.ones(7, dtype=torch.bfloat16), "c": torch.rand(0)}
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    file = tmp_path / "a.safetensors"
    info = write_safetensors(file, infos, tensors.__getitem__, metadata={"by": "a test"})
    assert info == FileInfo(size=file.stat().st_size, sha256=sha256_of_file(file))
    assert read_header(file).metadata == {"format": "pt", "by": "a test"}
    loaded = load_file(file)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_source_that_differs_from_its_description_is_an_error(tmp_path):
    with pytest.raises(ContractError, match="but its source described"):
        write_safetensors(
            tmp_path / "a", {"a": TensorInfo((3,), torch.float32)}, lambda name: torch.ones(2)
        )
    with pytest.raises(ContractError, match=r"no type for torch\.complex64"):
        write_safetensors(
            tmp_path / "b", {"a": TensorInfo((3,), torch.complex64)}, lambda name: torch.ones(3)
        )


@pytest.mark.parametrize("killed", ["while it wrote", "between the renames"])
def test_what_a_killed_writer_of_a_folder_left_is_cleared_away(tmp_path, killed):
    """By the next writer; of other folders, and of other writers of this one, everything stays."""
    target, other = tmp_path / "student", tmp_path / f".student.v2.{'0' * 32}.part"
    unfinished = tmp_path / f".student.{'a' * 32}.part"
    older = target if killed == "while it wrote" else unfinished.with_name(f"{unfinished.name}.old")
    for folder in (older, other, unfinished):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    with replace_folder(tmp_path / "student.v3", only_writer=True):
        pass
    with replace_folder(tmp_path / "elsewhere" / "student"):
        pass
    assert unfinished.exists()

    def fail() -> None:
        with replace_folder(target, only_writer=True) as stage:
            (stage / "file").write_text("new")
            assert (target / "file").read_text() == older.name
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (target / "file").read_text() == older.name
    with replace_folder(target, only_writer=True) as stage:
        (stage / "file").write_text("new")
    assert (target / "file").read_text() == "new"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"student", "student.v3", "elsewhere", other.name}
