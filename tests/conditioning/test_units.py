"""The folder of a data set that is made in units: whatever is begun, killed, added or damaged."""

from __future__ import annotations

import pytest
import torch
from distill_conditioning import (
    DataConfig,
    ItemKey,
    LatentDataset,
    ReportLine,
    ShardRows,
    UnitFolder,
    UnitRecord,
)
from distill_protocols import DataError
from distill_runtime import claim_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_data import SHAPE, CountingEncoder, embedding

ENCODER = CountingEncoder()


def keys(numbers) -> list[ItemKey]:
    return [ItemKey(id=f"item-{n}", digest=str(n)) for n in numbers]


def open_folder(path, numbers, *, per_unit=2, add=False, **changes) -> UnitFolder:
    return UnitFolder(
        path,
        settings={"dtype": "float32", **changes},
        items=keys(numbers),
        items_per_unit=per_unit,
        add=add,
    )


def make(folder: UnitFolder, items: list[ItemKey], unit: int, weights: str = "w") -> None:
    """Make a unit; of every third item nothing comes."""
    rows, report, digests = ShardRows(), [], {}
    for place in folder.items_of(unit):
        name = items[place].id
        number = int(name.removeprefix("item-"))
        if number % 3 == 2:
            report.append(ReportLine(id=name, skipped="it is bad"))
            continue
        caption = f"word {number}"
        cond = ENCODER.encode_condition([caption])
        digests[caption] = str(number % 2)
        rows.add(name, caption, cond, {"latents": torch.full(SHAPE, float(number))})
    shards = (folder.write_shard(unit, 0, rows),) if len(rows) else ()
    fingerprint = {"vae.weights": weights}
    record = UnitRecord(
        shards=shards, report=tuple(report), embeddings=digests, fingerprint=fingerprint
    )
    folder.finish_unit(unit, record)


def finish(folder: UnitFolder):
    return folder.finish(negative=("", ENCODER.encode_neg_condition("")), latent_dtype="float32")


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name[0] != "."}


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_whatever_is_killed_the_end_is_the_same(tmp_path_factory, data):
    """Processes in any order and number, each ended before any of its writes."""
    count = data.draw(st.integers(1, 9))
    per_unit = data.draw(st.integers(1, 4))
    items = keys(range(count))
    straight = tmp_path_factory.mktemp("straight")
    whole = open_folder(straight, range(count), per_unit=per_unit)
    for unit in whole.missing():
        make(whole, items, unit)
    summary = finish(whole)
    path = tmp_path_factory.mktemp("killed")
    for _ in range(50):
        world = data.draw(st.integers(1, 3))
        folder = open_folder(path, range(count), per_unit=per_unit)
        for unit in folder.missing(data.draw(st.integers(0, world - 1)), world):
            if data.draw(st.booleans()):
                (path / f".shard-{unit}.part.safetensors").write_bytes(b"torn")
                break
            make(folder, items, unit)
        if not folder.missing():
            break
    for unit in (folder := open_folder(path, range(count), per_unit=per_unit)).missing():
        make(folder, items, unit)
    assert finish(folder) == summary
    assert contents(path) == contents(straight)
    dataset = LatentDataset(DataConfig(path=str(path), verify="full"))
    good = [n for n in range(count) if n % 3 != 2]
    assert [dataset.id(n) for n in range(len(dataset))] == [f"item-{n}" for n in good]
    batch = dataset.read(torch.arange(len(good)))
    assert batch.latents[:, 0, 0, 0, 0].tolist() == good
    assert torch.equal(batch.cond.tensors["text"][0], embedding(f"word {good[0]}")[0])
    assert {line.id for line in summary.report} == {f"item-{n}" for n in range(2, count, 3)}


def test_what_kills_left_behind_is_gone_in_the_end(tmp_path):
    folder = open_folder(tmp_path, range(2))
    make(folder, keys(range(2)), 0)
    stems = (
        "shard-00000",
        "unit-00000",
        "items-000",
        "preparation",
        "index",
        "report",
        "constants",
    )
    for stem in stems:
        (tmp_path / f".{stem}.1a2b.part.json").write_text("torn")
        (tmp_path / f".{stem}.json.1a2b.part").write_text("torn")
    (tmp_path / ".mine.part").write_text("of somebody else")
    with claim_folder(tmp_path, "end"):
        assert finish(folder) is None  # another process is just writing the end
    assert finish(folder) is not None
    assert [path.name for path in tmp_path.iterdir() if path.name[0] == "."] == [".mine.part"]


def test_captions_that_share_an_embedding_are_named(tmp_path):
    folder = open_folder(tmp_path, range(5))
    assert finish(folder) is None  # nothing is there yet
    for unit in folder.missing():
        make(folder, keys(range(5)), unit)
    summary = finish(folder)
    assert summary.same_embedding == (("word 0", "word 4"), ("word 1", "word 3"))
    assert folder.is_complete()


def test_added_items_become_units_behind_those_before(tmp_path):
    folder = open_folder(tmp_path, [1, 3, 4])
    for unit in folder.missing():
        make(folder, keys([1, 3, 4]), unit)
    finish(folder)
    grown = [0, 1, 3, 4, 6]
    with pytest.raises(DataError, match=r"3 items, and there are 2 new ones \('item-0', 'item-6'"):
        open_folder(tmp_path, grown)
    folder = open_folder(tmp_path, grown, add=True)
    assert not folder.is_complete()
    assert folder.missing() == [2]
    assert [keys(grown)[n].id for n in folder.items_of(2)] == ["item-0", "item-6"]
    make(folder, keys(grown), 2)
    assert not (tmp_path / "index.json").exists()  # the former one vouches for what was
    finish(folder)
    assert open_folder(tmp_path, grown).is_complete()
    shard = folder.shard_path(1, 0)
    shard.write_bytes(shard.read_bytes() + b"more")
    assert open_folder(tmp_path, grown).missing() == [1]  # it is not as it was written


def test_other_items_settings_and_parts_are_refused(tmp_path):
    folder = open_folder(tmp_path, range(4))
    make(folder, keys(range(4)), 0)
    with pytest.raises(DataError, match=r"vae\.weights was w and is other"):
        make(folder, keys(range(4)), 1, weights="other")
    with pytest.raises(DataError, match="items_per_unit was 2 and is 3"):
        open_folder(tmp_path, range(4), per_unit=3)
    with pytest.raises(DataError, match='dtype was "float32" and is "float16"'):
        open_folder(tmp_path, range(4), dtype="float16")
    with pytest.raises(DataError, match=r"items that are gone \('item-3'\)"):
        open_folder(tmp_path, range(3))
    changed = [*keys(range(3)), ItemKey(id="item-3", digest="other")]
    with pytest.raises(DataError, match=r"items have changed .*'item-3'"):
        UnitFolder(tmp_path, settings={"dtype": "float32"}, items=changed, items_per_unit=2)


def test_as_long_as_nothing_was_made_settings_and_items_may_change(tmp_path):
    open_folder(tmp_path, range(4))
    assert open_folder(tmp_path, range(2), dtype="float16", per_unit=1).units == 2
    assert open_folder(tmp_path, range(5)).units == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "items-000.json", "preparation.json",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["items-000.json", "unit-00000.json", "preparation.json"])
@pytest.mark.parametrize("content", ["", "[1", '{"shards": 3}', '[["a"]]'])
def test_damaged_files_are_named(tmp_path, name, content):
    folder = open_folder(tmp_path, range(2))
    make(folder, keys(range(2)), 0)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=name.replace(".", r"\.") + "|was made with other settings"):
        open_folder(tmp_path, range(2)).missing()


def test_a_record_names_no_file_outside(tmp_path):
    folder = open_folder(tmp_path / "data", range(2))
    make(folder, keys(range(2)), 0)
    record = tmp_path / "data/unit-00000.json"
    record.write_text(record.read_text().replace("shard-00000", "../shard-00000"))
    with pytest.raises(DataError, match="lies outside"):
        folder.missing()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(DataError, match="it is another data set"):
        open_folder(tmp_path, range(2))
