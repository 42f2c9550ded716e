"""Trajectories in a data set: written shard by shard, in any order, and read with their sample."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distill_conditioning import (
    DataConfig,
    LatentDataset,
    LatentLoader,
    ShardRows,
    TrajectoryFolder,
    dataset_info,
    settings,
)
from distill_protocols import Condition, DataError
from toy_data import FINGERPRINT, SHAPE, embedding, write_dataset

TIMES = (1000.0, 756.757, 521.739)
SETTINGS = {"sampler": {"guidance": 6.0, "steps": 50}, "seed": 0, "times": list(TIMES)}


def folder(path: Path, samples: int = 10, *, settings=SETTINGS) -> TrajectoryFolder:
    return TrajectoryFolder(
        path,
        settings=settings,
        times=TIMES,
        samples=samples,
        samples_per_shard=4,
        ids=lambda number: f"clip-{number}",
        dtype="float32",
    )


def fill(folder_: TrajectoryFolder, shard: int) -> None:
    """Sample i: latents of the value i, its state k of the value i + (k + 1) / 8."""
    rows = ShardRows()
    for number in folder_.span(shard):
        caption = f"word {number % 3}"
        latents = torch.full((1, *SHAPE), float(number))
        states = torch.stack([latents + (k + 1) / 8 for k in range(3)], dim=1)
        folder_.add(
            rows, [number], [caption], Condition({"text": embedding(caption)}), latents, states
        )
    folder_.write(shard, rows)


def finish(folder_: TrajectoryFolder):
    negative = ("", Condition({"text": -embedding("")}))
    return folder_.finish(negative=negative, fingerprint={"text_encoder.weights": FINGERPRINT})


def whole(path: Path, samples: int = 10) -> Path:
    trajectories = folder(path, samples)
    for shard in trajectories.missing():
        fill(trajectories, shard)
    assert finish(trajectories) is not None
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_the_loader_gives_each_sample_its_own_trajectory(tmp_path):
    whole(tmp_path / "data")
    times = (521.74, 1000.0)  # some of them, in another order
    dataset = LatentDataset(DataConfig(path=str(tmp_path / "data"), workers=1), times=times)
    loader = LatentLoader(dataset, batch_size=3, seed=1)
    seen = set()
    for _, batch in zip(range(8), loader, strict=False):
        assert batch.trajectory.shape == (3, 2, *SHAPE)
        for row, name in enumerate(batch.ids):
            number = float(name.removeprefix("clip-"))
            seen.add(number)
            assert (batch.latents[row] == number).all()
            assert (batch.trajectory[row, 0] == number + 3 / 8).all()
            assert (batch.trajectory[row, 1] == number + 1 / 8).all()
    assert len(seen) == 10
    assert batch.to("meta").trajectory.is_meta


def test_trajectories_are_read_only_on_request(tmp_path):
    whole(tmp_path / "data")
    dataset = LatentDataset(DataConfig(path=str(tmp_path / "data")))
    assert dataset.read(torch.tensor([7, 2])).trajectory is None
    assert dataset.negative() is not None
    assert dataset.caption(7) == "word 1"
    assert dataset.id(7) == "clip-7"


def test_trajectory_times_that_are_not_stored_are_refused(tmp_path):
    data = whole(tmp_path / "data")
    assert dataset_info(data, times=(1000.0, 756.8)).problems == ()
    [problem] = dataset_info(data, times=(1000.0, 750.0)).problems
    assert "no level t = 750 among those stored (1000, 756.757, 521.739)" in problem
    assert "sampled at 1000, 750" in problem
    assert "make trajectories that keep its own" in problem
    with pytest.raises(DataError, match="no level t = 750"):
        LatentDataset(DataConfig(path=str(data)), times=(750.0,))
    plain = write_dataset(tmp_path / "plain", 5)
    [problem] = dataset_info(plain, times=(1000.0,)).problems
    assert "no trajectories" in problem
    assert "apps/trajectories" in problem
    assert "trajectory_times" not in json.loads((plain / "index.json").read_text())
    [problem] = dataset_info(tmp_path / "nowhere", times=(1000.0,)).problems
    assert "apps/trajectories" in problem


def test_shards_written_in_any_order_by_any_process_are_the_same(tmp_path):
    whole(tmp_path / "one")
    mine, theirs = folder(tmp_path / "two"), folder(tmp_path / "two")
    assert (mine.missing(0, 2), theirs.missing(1, 2)) == ([0, 2], [1])
    fill(mine, 2)
    assert finish(mine) is None
    assert not (tmp_path / "two" / "index.json").exists()
    fill(theirs, 1)
    again = folder(tmp_path / "two")  # as after a kill
    (tmp_path / "two" / ".shard-00000.safetensors.1.part").write_bytes(b"torn")
    assert again.missing() == [0]
    assert not again.complete()
    fill(again, 0)
    assert finish(again).samples == 10
    assert again.complete()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_more_samples_extend_the_folder(tmp_path):
    whole(tmp_path / "data", 6)
    more = folder(tmp_path / "data", 10)
    assert not more.complete()
    assert more.missing() == [1, 2]  # shard 1 held 2 of 4
    fill(more, 1)
    assert not (tmp_path / "data" / "index.json").exists()  # it vouched for the old shard
    fill(more, 2)
    finish(more)
    whole(tmp_path / "at once", 10)
    assert contents(tmp_path / "data") == contents(tmp_path / "at once")
    assert folder(tmp_path / "data", 3).complete()  # fewer are there, too


def test_other_settings_are_refused_with_what_differs(tmp_path):
    whole(tmp_path / "data")
    before = contents(tmp_path / "data")
    other = {"sampler": {"guidance": 5.0, "steps": 50}, "seed": 0, "times": [1000.0], "new": 1}
    with pytest.raises(DataError) as excinfo:
        folder(tmp_path / "data", settings=other)
    message = str(excinfo.value)
    assert "sampler.guidance was 6.0 and is 5.0" in message
    assert "new was not there and is 1" in message
    assert "times was" in message
    assert "steps" not in message
    assert contents(tmp_path / "data") == before


def test_another_data_set_in_the_folder_stays(tmp_path):
    write_dataset(tmp_path / "data", 5)
    before = contents(tmp_path / "data")
    with pytest.raises(DataError, match=r"another data set.*Name a new folder"):
        folder(tmp_path / "data")
    assert contents(tmp_path / "data") == before
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "trajectories.json").write_text("{")
    with pytest.raises(DataError, match="is no JSON"):
        folder(tmp_path / "torn")


def test_values_that_are_not_finite_are_not_stored(tmp_path):
    trajectories, rows = folder(tmp_path / "data"), ShardRows()
    latents = torch.zeros(1, *SHAPE)
    states = torch.full((1, 3, *SHAPE), float("nan"))
    with pytest.raises(DataError, match="clip-0: trajectories are not finite"):
        trajectories.add(rows, [0], ["a"], Condition({"text": embedding("a")}), latents, states)


def test_a_damaged_shard_is_named(tmp_path):
    data = whole(tmp_path / "data")
    file = data / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(DataError, match="shard-00001"):
        folder(data).missing()


def test_of_two_processes_that_start_at_once_one_is_refused(tmp_path, monkeypatch):
    """Both have seen that there are no settings yet, and the other one's come first."""
    write = settings.write_new_text

    def beaten(path: Path, text: str) -> bool:
        write(path, json.dumps({**SETTINGS, "seed": 1}))
        return write(path, text)

    monkeypatch.setattr(settings, "write_new_text", beaten)
    with pytest.raises(DataError, match="seed was 1 and is 0"):
        folder(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "trajectories.json").read_text())["seed"] == 1
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["trajectories.json"]
    folder(tmp_path / "b", settings={**SETTINGS, "seed": 1})  # the same ones are taken
