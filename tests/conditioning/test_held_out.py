"""Samples that are held out are never trained on, whatever the seed, the batches and the ranks."""

from __future__ import annotations

from itertools import islice

import pytest
from distill_conditioning import DataConfig, DataPart, DataSetConfig, LatentDataset, LatentLoader
from distill_conditioning.buckets import position_problem
from distill_protocols import DataError
from hypothesis import given
from hypothesis import strategies as st
from toy_data import write_dataset


def _read(dataset: LatentDataset, batches: int, **place) -> list[str]:  # type: ignore[no-untyped-def]
    return [name for batch in islice(LatentLoader(dataset, **place), batches) for name in batch.ids]


def _part(share: float, *, held_out: bool) -> DataPart:
    return DataPart(share=share, is_held_out=held_out)


@given(
    samples=st.integers(2, 23), share=st.floats(0.05, 0.5), world=st.integers(1, 3),
    seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)),
)  # fmt: skip
def test_the_two_parts_are_all_samples_and_share_none(dataset_of, samples, share, world, seeds):
    dataset = dataset_of(samples)
    count = min(round(samples * share), samples - 1)
    if count == 0:
        with pytest.raises(DataError, match="is none"):
            LatentLoader(dataset, batch_size=1, seed=0, part=_part(share, held_out=True))
        return
    both = []
    for is_held_out, size, seed in ((True, count, seeds[0]), (False, samples - count, seeds[1])):
        part = _part(share, held_out=is_held_out)
        by_rank = [
            _read(
                dataset, size, batch_size=1, seed=seed, part=part, rank=rank, world_size=world
            )
            for rank in range(world)
        ]  # fmt: skip
        given = [name for names in zip(*by_rank, strict=True) for name in names]
        epochs = [given[first : first + size] for first in range(0, len(given), size)]
        assert all(set(epoch) == set(given) for epoch in epochs), "an epoch is all of the part"
        assert len(set(given)) == size
        both.append(set(given))
    assert both[0].isdisjoint(both[1])
    assert len(both[0] | both[1]) == samples
    assert both[0] == set(
        _read(dataset, count, batch_size=1, seed=5, part=_part(share, held_out=True))
    )


def test_a_share_of_each_data_set_is_held_out(tmp_path):
    for name in ("a", "b"):
        write_dataset(tmp_path / name, 20)
    sets = tuple(DataSetConfig(path=str(tmp_path / name)) for name in ("a", "b"))
    dataset = LatentDataset(DataConfig(sets=sets))
    held_out = _read(dataset, 20, batch_size=1, seed=0, part=_part(0.1, held_out=True))
    assert {name: sum(s.startswith(name) for s in set(held_out)) for name in "ab"} == {
        "a": 2, "b": 2,
    }  # fmt: skip


def test_a_run_that_holds_out_another_share_does_not_go_on(dataset_of):
    dataset = dataset_of(20)

    def loader(part: DataPart | None) -> LatentLoader:
        return LatentLoader(dataset, batch_size=2, seed=0, part=part)

    plain, tenth = loader(None).state_dict(), loader(_part(0.1, held_out=False)).state_dict()
    loader(None).load_state_dict(plain)
    loader(_part(0.1, held_out=False)).load_state_dict(tenth)
    with pytest.raises(DataError, match=r"held-out samples was 0\.0 and is 0\.1"):
        loader(_part(0.1, held_out=False)).load_state_dict(plain)
    with pytest.raises(DataError, match=r"held-out samples was 0\.1 and is 0\.0"):
        loader(None).load_state_dict(tenth)
    assert "held_out" not in plain, "positions of runs that hold out nothing are as ever"
    assert position_problem(plain, {"seed": 0, "shuffle": True}) is None
