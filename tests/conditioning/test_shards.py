"""What is written is what is read, and a damaged data set is refused with the file's name."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from distill_conditioning import (
    CachedConditioning,
    ConditioningConfig,
    DataConfig,
    LatentDataset,
    SampleShape,
    ShardWriter,
    dataset_info,
)
from distill_conditioning.reading import map_tensors
from distill_conditioning.writing import write_tensors
from distill_protocols import (
    Condition,
    ConditioningError,
    DataError,
    LatentParts,
    OutputError,
    one_tensor,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open


def _open(folder: Path, verify: str = "index", **model) -> LatentDataset:
    return LatentDataset(DataConfig(path=str(folder), verify=verify), **model)


def _some(count: int, seed: int = 0) -> tuple[list[str], list[str], torch.Tensor, Condition]:
    generator = torch.Generator().manual_seed(seed)
    captions = [f"caption {i // 2}" for i in range(count)]
    text = torch.randn(count, 3, 4, generator=generator)[[i // 2 * 2 for i in range(count)]]
    latents = torch.randn(count, 2, 3, 4, 5, generator=generator)
    return [f"id {i}" for i in range(count)], captions, latents, Condition({"text": text})


def test_several_parts_are_read_where_a_run_has_them(tmp_path):
    """The first part decides the size; without the names of the others it is read alone."""
    ids, captions, latents, condition = _some(3)
    sound = torch.randn(3, 1, 6, 1, 2)
    both = LatentParts({"video": latents, "audio": sound})
    with ShardWriter(tmp_path / "both", latent_dtype="float32") as writer:
        writer.add(ids, captions, both, condition)
    with ShardWriter(tmp_path / "video", latent_dtype="float32") as writer:
        writer.add(ids, captions, latents, condition)
    shape = {"video": (2, 3, 4, 5), "audio": (1, 6, 1, 2)}
    order = torch.tensor([2, 0])

    dataset = _open(tmp_path / "both", verify="full", parts=("video", "audio"))
    read = dataset.read(order)
    assert isinstance(read.latents, LatentParts)
    assert read.latents.shapes == shape
    assert torch.equal(read.latents.tensors["video"], latents[order])
    assert torch.equal(read.latents.tensors["audio"], sound[order])
    assert read.latent_shape == shape["video"]
    assert torch.equal(
        one_tensor(_open(tmp_path / "both").read(order).clean_latents), latents[order]
    )

    wanted = [SampleShape(latents=shape["video"], conditions={}, parts=shape)]
    known = {name: dataset_info(tmp_path / name, shapes=wanted, needs_latents=True).problems
             for name in ("both", "video")}  # fmt: skip
    assert not known["both"]
    assert "one tensor" in known["video"][0]
    assert not dataset_info(tmp_path / "video", shapes=wanted).problems
    with pytest.raises(DataError, match="one tensor"):
        _open(tmp_path / "video", parts=("video", "audio"))
    index = json.loads((tmp_path / "video" / "index.json").read_text())
    assert "parts" not in index["shapes"][0]  # as it was before there were any

    bad = LatentParts({"video": latents, "audio": torch.full_like(sound, float("nan"))})
    with pytest.raises(DataError, match=r"latents\.audio"), ShardWriter(tmp_path / "nan") as writer:
        writer.add(ids, captions, bad, condition)


@given(cuts=st.lists(st.integers(1, 4), min_size=1, max_size=5), shard_bytes=st.integers(1, 3000))
def test_round_trip_however_it_is_cut(tmp_path_factory, cuts, shard_bytes):
    folder = tmp_path_factory.mktemp("cut")
    ids, captions, latents, condition = _some(sum(cuts))
    with ShardWriter(
        folder,
        fingerprint={"text_encoder.weights": "e"},
        shard_bytes=shard_bytes,
        latent_dtype="float32",
    ) as w:
        start = 0
        for cut in cuts:
            rows = slice(start, start + cut)
            # A buffer that is used again must not change what was added.
            buffer = latents[rows].clone()
            w.add(ids[rows], captions[rows], buffer, condition[rows])
            buffer.zero_()
            start += cut
    dataset = _open(folder, verify="full")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(1))
    batch = dataset.read(order)
    assert torch.equal(batch.latents, latents[order])
    assert torch.equal(batch.cond.tensors["text"], condition.tensors["text"][order])
    assert batch.ids == tuple(ids[i] for i in order)
    assert [dataset.caption(i) for i in order.tolist()] == [captions[i] for i in order]


def test_latents_are_stored_in_half_and_given_in_full_precision(tmp_path):
    ids, captions, latents, condition = _some(3)
    with ShardWriter(tmp_path) as writer:
        writer.add(ids, captions, latents, condition)
    batch = _open(tmp_path).read(torch.tensor([2, 0]))
    assert batch.latents.dtype == torch.float32
    assert torch.equal(batch.latents, latents[[2, 0]].half().float())


def test_a_caption_is_stored_once_a_shard_and_equal_data_gives_equal_bytes(tmp_path, make_folder):
    a, b = make_folder(tmp_path / "a", 12), make_folder(tmp_path / "b", 12)
    assert (a / "index.json").read_text() == (b / "index.json").read_text()
    full = make_folder(tmp_path / "whole", 12, shard_bytes=10**6)
    with safe_open(full / "shard-00000.safetensors", framework="pt") as file:
        assert file.get_slice("conditions.text").get_shape()[0] == 3


def test_info_needs_no_tensor(tmp_path, make_folder):
    info = dataset_info(make_folder(tmp_path, 10, negative="ugly"))
    assert not info.problems
    assert (info.samples, info.shapes[0].latents) == (10, (2, 1, 2, 2))
    assert (info.negative_prompt, info.has_negative) == ("ugly", True)
    assert info.shards == len(list(tmp_path.glob("shard-*")))


def test_a_data_set_without_constants_has_no_negative(tmp_path, make_folder):
    folder = make_folder(tmp_path, 3, negative=None)
    assert _open(folder).negative() is None
    assert not dataset_info(folder).has_negative


@pytest.mark.parametrize("name", ["no-such", "empty"])
def test_no_data_set(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=name):
        _open(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"version": 3}, "version"),
        ({"format": "webdataset"}, "webdataset"),
        ({"samples": 11}, "11"),
        ({"shapes": None}, "index.json"),
        ({"shards": [{"file": "x"}]}, "index.json"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, make_folder, change, word):
    path = make_folder(tmp_path, 10) / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=word):
        _open(tmp_path)


def test_every_missing_and_truncated_shard_is_named_at_once(tmp_path, make_folder):
    make_folder(tmp_path, 10)
    first, second = sorted(tmp_path.glob("shard-*"))[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-7])
    with pytest.raises(DataError) as excinfo:
        _open(tmp_path)
    assert first.name in str(excinfo.value)
    assert second.name in str(excinfo.value)
    assert "truncated" in str(excinfo.value)


def test_a_flipped_byte_is_found_by_full_verification(tmp_path, make_folder):
    shard = sorted(make_folder(tmp_path, 10).glob("shard-*"))[1]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    _open(tmp_path)
    with pytest.raises(DataError, match=shard.name):
        _open(tmp_path, verify="full")


@pytest.mark.parametrize("kind", ["pickle", "header", "offsets", "zeros"])
def test_a_file_that_is_no_safetensors_is_a_problem_though_its_size_is_right(
    tmp_path, make_folder, kind
):
    """Before the run, not when the shard is opened in the middle of it."""
    shard = make_folder(tmp_path, 4, shard_bytes=10**6) / "shard-00000.safetensors"
    size = shard.stat().st_size
    damaged = {
        "pickle": pickle.dumps({"latents": [1.0]}),
        "header": shard.read_bytes()[:20] + b"{{" + shard.read_bytes()[22:],
        "offsets": re.sub(rb'(offsets":\[\d+,)\d', rb"\g<1>9", shard.read_bytes()),
        "zeros": b"",
    }[kind]
    assert damaged != shard.read_bytes()
    shard.write_bytes(damaged.ljust(size, b"\0")[:size])
    [problem] = dataset_info(tmp_path).problems
    assert shard.name in problem
    with pytest.raises(DataError, match=shard.name):
        _open(tmp_path)


def test_a_shard_of_another_data_set_is_refused(tmp_path, make_folder):
    folder = make_folder(tmp_path / "a", 4, shard_bytes=10**6)
    ids, captions, latents, condition = _some(4)
    with ShardWriter(tmp_path / "b") as writer:
        writer.add(ids, captions, latents, condition)
    shard = folder / "shard-00000.safetensors"
    shard.write_bytes((tmp_path / "b" / shard.name).read_bytes())
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["bytes"] = shard.stat().st_size
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"shard-00000.*\(2, 3, 4, 5\)"):
        _open(folder).read(torch.tensor([0]))


def test_other_shapes_than_the_models_are_named_both(tmp_path, make_folder):
    make_folder(tmp_path, 4)
    with pytest.raises(DataError, match=r"\[2, 1, 2, 2\].*\[16, 21, 60, 104\]"):
        _open(tmp_path, shapes=[SampleShape(latents=(16, 21, 60, 104), conditions={})])
    for wrong in [(3, 4096), (512, 4)]:
        with pytest.raises(DataError, match=rf"\[3, 4\].*\[{wrong[0]}, {wrong[1]}\].*Preprocess"):
            _open(tmp_path, shapes=[SampleShape(latents=None, conditions={"text": wrong})])
    right = SampleShape(latents=(2, 1, 2, 2), conditions={"text": (3, 4)})
    other = SampleShape(latents=(2, 3, 2, 2), conditions={"text": (5, 4)})
    _open(tmp_path, shapes=[other, right])


def test_an_interrupted_writer_leaves_no_data_set_and_says_so_next_time(tmp_path):
    ids, captions, latents, condition = _some(4)

    def interrupted() -> None:
        with ShardWriter(tmp_path, shard_bytes=1) as writer:
            writer.add(ids, captions, latents, condition)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (tmp_path / "index.json").exists()
    assert "interrupted" in dataset_info(tmp_path).problems[0]
    with pytest.raises(DataError, match="interrupted"):
        ShardWriter(tmp_path)


def test_a_shard_that_cannot_be_written_leaves_no_part(tmp_path, monkeypatch):
    ids, captions, latents, condition = _some(4)

    def full_disk(part, infos, read, *, metadata):
        Path(part).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("distill_conditioning.writing.write_safetensors", full_disk)
    writer = ShardWriter(tmp_path, shard_bytes=1)
    with pytest.raises(OSError, match="No space"):
        writer.add(ids, captions, latents, condition)
    assert [path.name for path in tmp_path.iterdir()] == [".writer.lock"]


def test_a_writer_refuses_a_folder_that_holds_a_data_set(tmp_path, make_folder):
    make_folder(tmp_path, 4)
    with pytest.raises(DataError, match="already"):
        ShardWriter(tmp_path)


def test_a_writer_refuses_what_cannot_be_batched_or_trained_on(tmp_path):
    ids, captions, latents, condition = _some(4)
    writer = ShardWriter(tmp_path)
    writer.add(ids, captions, latents, condition)
    with pytest.raises(DataError, match=r"id 0.*captions alone.*\[2, 3, 4, 5\]"):
        writer.add(ids, captions, None, condition)
    with pytest.raises(DataError, match=r"id 0.*must be \[C, T, H, W\]"):
        writer.add(ids, captions, latents[..., 0], condition)
    with pytest.raises(DataError, match="3 ids"):
        writer.add(ids[:3], captions, latents, condition)
    latents[2, 0, 0, 0, 0] = 70_000  # inf in float16
    with pytest.raises(DataError, match=r"id 2.*float16"):
        writer.add(ids, captions, latents, condition)
    with pytest.raises(DataError, match="at least one"), ShardWriter(tmp_path / "empty"):
        pass


def test_constants_that_do_not_fit_the_samples_are_refused(tmp_path):
    ids, captions, latents, condition = _some(2)
    with ShardWriter(tmp_path) as writer:
        writer.add(ids, captions, latents, condition)
        writer.set_negative("", Condition({"text": torch.zeros(1, 9, 4)}))
    with pytest.raises(ConditioningError, match=r"constants.*9"):
        _open(tmp_path).negative()


@pytest.mark.parametrize("wrong", ["condition_id", "ids", "captions"])
def test_a_shard_whose_parts_do_not_belong_together_is_refused(tmp_path, make_folder, wrong):
    path = make_folder(tmp_path, 4, shard_bytes=10**6) / "shard-00000.safetensors"
    tensors, metadata = map_tensors(path)
    if wrong == "condition_id":
        tensors["condition_id"] = tensors["condition_id"] + 1  # the last row is past the table
    else:
        metadata[wrong] = metadata[wrong][1:]
    write_tensors(path, tensors, metadata)
    index = json.loads((tmp_path / "index.json").read_text())
    index["shards"][0]["bytes"] = path.stat().st_size
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"shard-00000.*(do not belong together|holds 3 samples)"):
        _open(tmp_path).read(torch.tensor([0]))


def test_a_second_writer_is_refused_while_the_first_one_writes(tmp_path):
    with ShardWriter(tmp_path) as writer:
        with pytest.raises(OutputError, match="another process is writing there"):
            ShardWriter(tmp_path)
        writer.add(*_some(2))
    with pytest.raises(DataError, match="already"):
        ShardWriter(tmp_path)
    assert not (tmp_path / ".writer.lock").exists()


def test_a_writer_whose_only_samples_were_refused_writes_no_data_set(tmp_path):
    ids, captions, latents, condition = _some(2)
    writer = ShardWriter(tmp_path)
    with pytest.raises(DataError, match="not finite"):
        writer.add(ids, captions, latents * float("nan"), condition)
    with pytest.raises(DataError, match="at least one"):
        writer.close()
    assert not (tmp_path / "index.json").exists()


def test_files_are_readable_as_the_umask_allows(tmp_path, encoder):
    before = os.umask(0o027)
    try:
        with ShardWriter(tmp_path / "data") as writer:
            writer.set_negative("", encoder.encode_neg_condition(""))
            writer.add(*_some(2))
        CachedConditioning(
            ConditioningConfig(), encoder=encoder, output_dir=tmp_path / "run"
        ).encode(["a"])
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4, "a shard, constants, an index and a cached prompt"
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
