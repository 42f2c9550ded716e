"""Data sets of several shapes, of several captions a sample, and how small they are stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from distill_conditioning import DataConfig, LatentDataset, SampleShape, ShardWriter, dataset_info
from distill_conditioning.format import CONDITION, LENGTHS, read_index
from distill_conditioning.reading import map_tensors
from distill_conditioning.writing import write_tensors
from distill_protocols import Condition, DataError
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.int64: torch.int64}
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int64": torch.int64}


def open_folder(folder: Path) -> LatentDataset:
    return LatentDataset(DataConfig(path=str(folder)))


def write(folder: Path, condition: Mapping[str, Tensor], captions=None, **options) -> LatentDataset:
    count = len(captions or next(iter(condition.values())))
    with ShardWriter(folder, **options) as writer:
        writer.add(
            [f"id {i}" for i in range(count)],
            captions or [f"caption {i}" for i in range(count)],
            torch.arange(count * 4.0).view(count, 1, 1, 2, 2),
            Condition(condition),
        )
    return open_folder(folder)


def padded(lengths: list[int], row: tuple[int, ...], kind: torch.dtype, seed: int) -> Tensor:
    """Return rows that are zero beyond their first ``lengths``, the last with one bit set."""
    values = torch.zeros(len(lengths), *row, dtype=kind)
    generator = torch.Generator().manual_seed(seed)
    for i, length in enumerate(lengths):
        part = torch.randn(length, *row[1:], generator=generator) * 100
        values[i, :length] = part.to(kind)
        if length:
            values[i, length - 1] = 1 if kind == torch.int64 else -0.0
    return values


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    width=st.sampled_from([(), (1,), (3, 2)]),
    kind=st.sampled_from(sorted(KINDS)),
    shard_bytes=st.sampled_from([1, 60, 10**6]),
    seed=st.integers(0, 99),
)
def test_conditions_lose_their_padding_and_not_one_bit(
    tmp_path_factory, lengths, width, kind, shard_bytes, seed
):
    values = padded(lengths, (5, *width), KINDS[kind], seed)
    dataset = write(tmp_path_factory.mktemp("d"), {"text": values}, shard_bytes=shard_bytes)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    found = dataset.read(order).cond.tensors["text"]
    expected = values.float() if values.is_floating_point() else values
    bits = BITS[expected.dtype]
    assert torch.equal(found.view(bits), expected[order].view(bits))
    stored = sum(
        len(map_tensors(dataset.sources[0].path / shard.file)[0][CONDITION + "text"])
        * (1 if cut else 5)
        for shard in dataset.sources[0].index.shards
        for cut in [LENGTHS + "text" in map_tensors(dataset.sources[0].path / shard.file)[0]]
    )
    assert stored == sum(lengths)


@pytest.mark.parametrize(
    ("name", "dtype"), [("exact", torch.bfloat16), ("not", torch.float32), ("half", torch.float16)]
)
def test_a_condition_is_stored_in_the_precision_that_it_has(tmp_path, name, dtype):
    values = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    given_out = {"exact": values.bfloat16().float(), "not": values, "half": values.half()}[name]
    dataset = write(tmp_path, {"text": given_out})
    stored = map_tensors(tmp_path / "shard-00000.safetensors")[0][CONDITION + "text"]
    assert stored.dtype == dtype
    found = dataset.read(torch.arange(2)).cond.tensors["text"]
    assert found.dtype == torch.float32
    assert torch.equal(found, given_out.float())


def test_a_caption_costs_what_it_says_and_not_the_length_of_the_encoder(tmp_path):
    text = torch.zeros(4, 512, 64)
    text[:, :40] = torch.randn(4, 40, 64).bfloat16().float()
    dataset = write(tmp_path, {"text": text})
    assert dataset.sources[0].index.bytes_per_sample < 40 * 64 * 2 + 1000
    assert dataset.sources[0].index.shapes[0].conditions == {"text": (512, 64)}


def test_samples_of_several_shapes_are_read_by_shape_and_not_mixed(tmp_path):
    shapes = [(2, 1, 4, 2), (2, 3, 2, 2)]
    with ShardWriter(tmp_path, shard_bytes=200) as writer:
        for start, shape in ((0, shapes[0]), (3, shapes[1]), (6, shapes[0])):
            numbers = torch.arange(start, start + 3)
            latents = numbers.view(-1, 1, 1, 1, 1).expand(-1, *shape).float()
            captions = [f"caption {n}" for n in numbers.tolist()]
            text = numbers.view(-1, 1, 1).expand(-1, 2, 2).float()
            writer.add(captions, captions, latents, Condition({"text": text}))
    dataset = open_folder(tmp_path)
    expected = [SampleShape(latents=s, conditions={"text": (2, 2)}) for s in shapes]
    assert list(dataset.sources[0].index.shapes) == expected
    assert dataset_info(tmp_path).shapes == dataset.sources[0].index.shapes
    seen = set()
    for sample in range(len(dataset)):
        batch = dataset.read(torch.tensor([sample, sample]))
        number = int(dataset.id(sample).removeprefix("caption "))
        seen.add(number)
        assert tuple(batch.latents.shape[1:]) == shapes[3 <= number < 6]
        assert (batch.latents == number).all()
        assert (batch.cond.tensors["text"] == number).all()
    assert seen == set(range(9))
    with pytest.raises(DataError, match=r"\[2, 1, 4, 2\].*\[2, 3, 2, 2\].*cannot be one batch"):
        dataset.read(torch.arange(len(dataset)))


def test_shards_of_many_shapes_are_written_before_they_fill_the_memory(tmp_path):
    with ShardWriter(tmp_path, shard_bytes=1000) as writer:
        for size in range(1, 30):
            latents = torch.zeros(1, 1, 1, 1, 100 + size)
            writer.add([str(size)], ["x"], latents, Condition({"text": torch.ones(1, 2)}))
            assert sum(rows.bytes for rows in writer._rows) < 4 * 1000
    assert len(open_folder(tmp_path)) == 29


def test_shapes_that_no_loader_could_batch_are_refused_in_an_index_too(tmp_path):
    write(tmp_path, {"text": torch.ones(2, 3)})
    path = tmp_path / "index.json"
    index = json.loads(path.read_text())
    other = {"latents": [1, 1, 2, 2], "conditions": {"text": [4]}}
    index["shapes"].append(other)
    index["shards"].append({**index["shards"][0], "shape": 1})
    index["samples"] *= 2
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match="those of one latent shape the same shapes"):
        read_index(tmp_path)
    index["shards"][1]["shape"] = 2
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match="missing or of the wrong type"):
        read_index(tmp_path)


def test_a_sample_may_have_several_captions(tmp_path):
    captions = [["a", "b", "c"], "d", ["e", "a"]]
    text = torch.tensor([1.0, 2, 3, 4, 5, 1]).view(6, 1, 1).expand(6, 2, 2)
    dataset = write(tmp_path, {"text": text}, captions)
    assert [dataset.captions(i) for i in range(3)] == [("a", "b", "c"), ("d",), ("e", "a")]
    assert dataset.caption(2) == "e"
    for choice, expected in [(0, [1, 4, 5]), (1, [2, 4, 1]), (2, [3, 4, 5]), (7, [2, 4, 1])]:
        batch = dataset.read(torch.arange(3), torch.full((3,), choice))
        assert batch.cond.tensors["text"][:, 0, 0].tolist() == expected
    shard = map_tensors(tmp_path / "shard-00000.safetensors")[0]
    assert shard["condition_id"].tolist() == [[0, 1, 2], [3, -1, -1], [4, 0, -1]]
    with pytest.raises(DataError, match="a condition a caption"):
        write(tmp_path / "other", {"text": text[:5]}, captions)


@pytest.mark.parametrize("damage", ["negative", "long", "sum", "type", "gap", "none", "below"])
def test_lengths_and_captions_that_cannot_be_are_refused(tmp_path, damage):
    text = torch.ones(4, 3, 2)
    text[0, 1:] = 0
    write(tmp_path, {"text": text}, [["a", "b"], "c", "d"])
    path = tmp_path / "shard-00000.safetensors"
    tensors, metadata = map_tensors(path)
    tensors = {name: value.clone() for name, value in tensors.items()}
    lengths, ids = tensors[LENGTHS + "text"], tensors["condition_id"]
    assert lengths.tolist() == [1, 3, 3, 3]
    if damage in ("gap", "none", "below"):
        ids[1] = torch.tensor({"gap": [-1, 2], "none": [-1, -1], "below": [2, -2]}[damage])
    elif damage == "type":
        tensors[LENGTHS + "text"] = lengths.float()
    else:
        lengths[:2] = torch.tensor({"negative": [-1, 3], "long": [0, 4], "sum": [1, 2]}[damage])
        if damage == "negative":  # which the sum alone would not show
            tensors[CONDITION + "text"] = tensors[CONDITION + "text"][:8]
    write_tensors(path, tensors, metadata)
    index = json.loads((tmp_path / "index.json").read_text())
    index["shards"][0]["bytes"] = path.stat().st_size
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"shard-00000.*(lengths of 'text'|do not belong together)"):
        open_folder(tmp_path).read(torch.tensor([0]))
