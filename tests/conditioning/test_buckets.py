"""Several shapes and several data sets in one loader: order, shares, resume, ranks and dropout."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from distill_conditioning import (
    ConditioningConfig,
    DataConfig,
    DataSetConfig,
    LatentDataset,
    LatentLoader,
    ShardWriter,
)
from distill_conditioning.buckets import Position, make_buckets
from distill_conditioning.order import BucketOrder
from distill_protocols import Batch, Condition, ConditioningError, DataError
from hypothesis import given
from hypothesis import strategies as st

SHAPES = [(1, 1, 2, 2), (1, 1, 2, 3), (1, 3, 1, 1)]
NEGATIVE = -1.0
seeds = st.integers(0, 2**63 - 1)


class Mix(NamedTuple):
    """Data sets: samples of each shape, and weights (0: none)."""

    counts: tuple[tuple[int, ...], ...]
    weights: tuple[int, ...]


def write(folder: Path, counts: tuple[int, ...], *, negative: str = "") -> None:
    """Sample i of shape s: id ``s-i``, a caption of the value i, and a picture of the value i."""
    with ShardWriter(folder, shard_bytes=150) as writer:
        writer.set_negative(negative, Condition({"text": torch.full((1, 2, 2), NEGATIVE)}))
        for number, count in enumerate(counts):
            if not count:
                continue
            values = torch.arange(1.0, count + 1)
            ids = [f"{number}-{i}" for i in range(count)]
            latents = values.view(-1, 1, 1, 1, 1).expand(-1, *SHAPES[number])
            text = values.view(-1, 1, 1).expand(-1, 2, 2)
            image = values.view(-1, 1).expand(-1, 1 + number)
            writer.add(ids, ids, latents, Condition({"text": text, "image": image}))


@pytest.fixture(scope="module")
def open_mix(tmp_path_factory) -> Callable[..., LatentDataset]:
    @functools.cache
    def folder(counts: tuple[int, ...], number: int) -> str:
        path = tmp_path_factory.mktemp("mix") / f"set{number}"
        write(path, counts)
        return str(path)

    @functools.cache
    def build(mix: Mix, workers: int = 0, shuffle: bool = True) -> LatentDataset:
        paths = [folder(counts, n) for n, counts in enumerate(mix.counts)]
        options = {"workers": workers, "shuffle": shuffle}
        if len(paths) == 1:
            return LatentDataset(DataConfig(path=paths[0], **options))
        sets = tuple(
            DataSetConfig(path=path, weight=weight or None)
            for path, weight in zip(paths, mix.weights, strict=True)
        )
        return LatentDataset(DataConfig(sets=sets, **options))

    return build


counts = st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 5)).filter(sum)


@st.composite
def mixes(draw: st.DrawFn) -> Mix:
    sets = draw(st.lists(counts, min_size=1, max_size=3))
    weights = draw(st.lists(st.integers(1, 5), min_size=len(sets), max_size=len(sets)))
    return Mix(tuple(sets), tuple(weights) if draw(st.booleans()) else (0,) * len(sets))


def bucket_of(name: str) -> str:
    return name.rpartition("-")[0]


def expected_shares(mix: Mix) -> dict[str, Fraction]:
    weights = [
        weight or sum(counts) for counts, weight in zip(mix.counts, mix.weights, strict=True)
    ]
    prefix = "set{}/{}" if len(mix.counts) > 1 else "{1}"
    return {
        prefix.format(number, shape): Fraction(weights[number] * count, sum(weights) * sum(counts))
        for number, counts in enumerate(mix.counts)
        for shape, count in enumerate(counts)
        if count
    }


@given(
    mix=mixes(),
    batch_size=st.integers(1, 3),
    accumulation=st.integers(1, 2),
    world_size=st.integers(1, 3),
    workers=st.integers(0, 2),
    seed=seeds,
)
def test_epochs_shapes_and_shares_over_ranks_workers_and_buckets(
    open_mix, mix, batch_size, accumulation, world_size, workers, seed
):
    group = batch_size * accumulation * world_size
    dataset = open_mix(mix, workers)
    ranks = [
        iter(
            LatentLoader(
                dataset, batch_size=batch_size, seed=seed, group_size=group, rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]  # fmt: skip
    shares = expected_shares(mix)
    bucket_count = Counter(dict.fromkeys(shares, 0))
    streams: dict[str, list[str]] = {name: [] for name in shares}
    for number in range(1, 2 + 2 * len(dataset) // group):
        groups = [[next(rank) for _ in range(accumulation)] for rank in ranks]
        batches = [batch for own in groups for batch in own]
        # A group is of one bucket, on all ranks and micro steps.
        assert len({tuple(batch.latents.shape[1:]) for batch in batches}) == 1
        names = {bucket_of(name) for batch in batches for name in batch.ids}
        assert len(names) == 1
        [name] = names
        for step in range(accumulation):
            for row in range(batch_size):
                streams[name] += [own[step].ids[row] for own in groups]
        # Shares hold at every moment.
        bucket_count[name] += group
        for bucket, share in shares.items():
            ahead = bucket_count[bucket] - share * number * group
            assert -(len(shares) - 1) * group < ahead < group or len(shares) == 1
    for name, stream in streams.items():
        size = len({one for one in _ids(mix) if bucket_of(one) == name})
        for first in range(0, len(stream) - size + 1, size):
            epoch = stream[first : first + size]
            assert len(set(epoch)) == size, "each sample once"


def _ids(mix: Mix) -> list[str]:
    several = len(mix.counts) > 1
    return [
        f"{f'set{number}/' if several else ''}{shape}-{i}"
        for number, counts in enumerate(mix.counts)
        for shape, count in enumerate(counts)
        for i in range(count)
    ]


def rows(batch: Batch) -> list[tuple[str, bool]]:
    dropped = (batch.cond.tensors["text"] == NEGATIVE).flatten(1).all(dim=1)
    return list(zip(batch.ids, dropped.tolist(), strict=True))


@given(
    mix=mixes(),
    seed=seeds,
    path=st.lists(
        st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 5), st.integers(0, 2)),
        min_size=2,
        max_size=4,
    ),
)
def test_any_number_of_ranks_and_workers_goes_on_in_the_same_stream(open_mix, mix, seed, path):
    """Also from within an iteration."""

    def loader(ranks: int, rank: int, workers: int) -> LatentLoader:
        dataset = open_mix(mix, workers)
        negative = dataset.negative()
        assert negative is not None
        return LatentLoader(
            dataset, batch_size=4 // ranks, seed=seed, group_size=8, dropout=0.4,
            negative=negative.condition, rank=rank, world_size=ranks,
        )  # fmt: skip

    alone = loader(1, 0, 0)
    position, stream = alone.state_dict(), []
    for ranks, batches, workers in path:
        loaders = [loader(ranks, rank, workers) for rank in range(ranks)]
        for each in loaders:
            each.load_state_dict(position)
        for parts in islice(zip(*loaders, strict=True), batches):
            in_turn = zip(*map(rows, parts), strict=True)
            stream += [row for rows_of_all in in_turn for row in rows_of_all]
        position, *others = [each.state_dict() for each in loaders]
        assert all(other == position for other in others)
    assert stream == [row for batch in islice(alone, len(stream) // 4) for row in rows(batch)]
    assert position == alone.state_dict()


def test_one_bucket_has_the_order_that_it_always_had(open_mix):
    """Of seed 0: as release 2.0 read it."""
    loader = LatentLoader(open_mix(Mix(((7, 0, 0),), (0,))), batch_size=7, seed=0)
    first, second = islice(loader, 2)
    numbers = [[int(name.removeprefix("0-")) for name in batch.ids] for batch in (first, second)]
    assert numbers == [[4, 2, 5, 3, 6, 0, 1], [5, 1, 3, 4, 6, 2, 0]]
    assert loader.state_dict().keys() == {
        "samples_given", "seed", "shuffle", "dataset_samples", "dataset",
    }  # fmt: skip


@pytest.mark.parametrize("interval", [2, 3, 5])
def test_no_bucket_meets_the_turns_of_a_method_alone(interval):
    """A fixed rota of two buckets would give the student, every second turn, one of them only."""
    order = BucketOrder(seed=3, shares=(Fraction(1, 2), Fraction(1, 2)), group_size=4)
    position, drawn = Position(taken=(0, 0)), []
    for _ in range(400):
        drawn.append(order.bucket(position))
        position = order.advance(position, 4)
    for first in range(interval):
        share = sum(drawn[first::interval]) / len(drawn[first::interval])
        assert 0.35 < share < 0.65


def test_an_iteration_cannot_be_cut_by_a_batch(open_mix):
    dataset = open_mix(Mix(((3, 3, 0),), (0,)))
    with pytest.raises(DataError, match="no whole number of batches of 3 on 2"):
        LatentLoader(dataset, batch_size=3, seed=0, group_size=8, world_size=2)
    loader = LatentLoader(dataset, batch_size=2, seed=0, group_size=6)
    next(iter(loader))
    for group, batch_size in [(4, 2), (6, 3)]:
        other = LatentLoader(dataset, batch_size=batch_size, seed=0, group_size=group)
        with pytest.raises(DataError, match="within a group of 6"):
            other.load_state_dict(loader.state_dict())
    for _ in islice(loader, 2):  # to the end of the iteration
        pass
    LatentLoader(dataset, batch_size=2, seed=0, group_size=4).load_state_dict(loader.state_dict())


@pytest.mark.parametrize(
    ("now", "word"),
    [
        (Mix(((3, 0, 0), (2, 2, 0), (1, 0, 0)), (0, 0, 0)), "'set2' was added"),
        (Mix(((3, 0, 0),), (0,)), "one of the two reads one data set, and the other mixes set0"),
        (Mix(((3, 0, 0), (2, 1, 0)), (0, 0)), "'set1' had weight None and checksum"),
        (Mix(((3, 0, 0), (2, 2, 0)), (1, 2)), "'set0' had weight None.*has 1"),
    ],
    ids=["added", "one", "replaced", "weights"],
)
def test_a_position_in_another_mixture_is_refused(open_mix, now, word):
    then = Mix(((3, 0, 0), (2, 2, 0)), (0, 0))
    state = LatentLoader(open_mix(then), batch_size=2, seed=0).state_dict()
    other = LatentLoader(open_mix(now), batch_size=2, seed=0)
    with pytest.raises(DataError, match=word):
        other.load_state_dict(state)
    with pytest.raises(DataError, match="does not fit this run"):
        LatentLoader(open_mix(then), batch_size=2, seed=0).load_state_dict(other.state_dict())


def test_shares_are_those_of_the_text(tmp_path):
    write(tmp_path / "a", (2, 1, 0))
    write(tmp_path / "b", (1, 0, 0))
    config = DataConfig(
        sets=(
            DataSetConfig(path=str(tmp_path / "a"), weight=0.1),
            DataSetConfig(path=str(tmp_path / "b"), weight=0.2, name="other"),
        )
    )
    buckets = make_buckets(LatentDataset(config).sources)
    assert [bucket.share for bucket in buckets] == [
        Fraction(2, 9), Fraction(1, 9), Fraction(2, 3),
    ]  # fmt: skip
    assert [bucket.key[0] for bucket in buckets] == ["a", "a", "other"]


@pytest.mark.parametrize(
    ("sets", "word"),
    [
        ([{"path": "x/a"}, {"path": "y/a"}], "a: two data sets have this name"),
        ([{"path": "a", "weight": 1.0}, {"path": "b"}], "Give all of them one, or none"),
        ([{"path": "a", "weight": 0.0}], "0 must be a number above 0"),
        ([{"path": "a", "weight": float("nan")}], "nan must be a number above 0"),
        ([{"path": "a", "name": " "}], "must name"),
    ],
    ids=["names", "some", "zero", "nan", "blank"],
)
def test_sets_that_cannot_be_mixed_are_refused(sets, word):
    with pytest.raises(ValueError, match=word):
        DataConfig(sets=tuple(DataSetConfig(**one) for one in sets))


def test_path_and_sets_exclude_each_other():
    with pytest.raises(ValueError, match="beside sets"):
        DataConfig(path="a", sets=(DataSetConfig(path="b"),))
    with pytest.raises(ValueError, match="missing"):
        DataConfig()


def test_data_sets_of_other_kinds_are_not_mixed(tmp_path):
    write(tmp_path / "a", (2, 0, 0))
    with ShardWriter(tmp_path / "b") as writer:
        writer.add(
            ["x"], ["x"], torch.ones(1, *SHAPES[0]), Condition({"text": torch.ones(1, 2, 2)})
        )
    sets = tuple(DataSetConfig(path=str(tmp_path / name)) for name in "ab")
    with pytest.raises(DataError, match="hold different things"):
        LatentDataset(DataConfig(sets=sets))


def test_different_negative_prompts_need_one_that_is_meant(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, (2, 0, 0), negative=name)
    dataset = LatentDataset(
        DataConfig(sets=tuple(DataSetConfig(path=str(tmp_path / name)) for name in "ab"))
    )
    with pytest.raises(ConditioningError, match=r"different negative prompts \('a', 'b'\)"):
        dataset.negative()
    stored = dataset.negative("b")
    assert stored is not None
    assert stored.prompt == "b"
    assert dataset.negative("c") is None


# -- dropout and captions -------------------------------------------------------------------------


def dropped(dataset: LatentDataset, dropout, batches: int, **options) -> list[dict[str, bool]]:
    """By sample that was read, which of its tensors were dropped."""
    negative = dataset.negative()
    assert negative is not None
    loader = LatentLoader(
        dataset, batch_size=10, seed=1, dropout=dropout, negative=negative.condition, **options
    )
    values = {"text": NEGATIVE, "image": 0.0}
    return [
        {name: bool((batch.cond.tensors[name][i] == values[name]).all()) for name in values}
        for batch in islice(loader, batches)
        for i in range(len(batch.ids))
    ]


@pytest.mark.parametrize("mix", [Mix(((9, 0, 0),), (0,)), Mix(((4, 3, 2), (5, 0, 1)), (1, 1))])
def test_each_part_is_dropped_by_a_draw_of_its_own(open_mix, mix):
    rates = {"text": 0.3, "image": 0.5}
    found = dropped(open_mix(mix), rates, 200)
    for name, rate in rates.items():
        share = sum(one[name] for one in found) / len(found)
        assert abs(share - rate) < 4 * (rate * (1 - rate) / len(found)) ** 0.5
    both = sum(one["text"] and one["image"] for one in found) / len(found)
    assert abs(both - 0.15) < 0.04
    alone = dropped(open_mix(mix), {"image": 0.5}, 200)
    assert [one["image"] for one in alone] == [one["image"] for one in found]
    assert not any(one["text"] for one in alone)


def test_one_rate_drops_what_the_negative_condition_holds(open_mix):
    found = dropped(open_mix(Mix(((4, 3, 2),), (0,))), 1.0, 5)
    assert all(one == {"text": True, "image": False} for one in found)


def test_a_bucket_drops_others_in_another_epoch(open_mix):
    mix = Mix(((10, 0, 0), (10, 0, 0)), (1, 1))
    found = dropped(open_mix(mix, shuffle=False), 0.5, 4)
    texts = [[one["text"] for one in found[i : i + 10]] for i in range(0, 40, 10)]
    assert len({tuple(epoch) for epoch in texts}) == 4


def test_a_part_that_no_sample_has_cannot_be_dropped(open_mix):
    with pytest.raises(ConditioningError, match=r"of audio, but the samples have text, image"):
        dropped(open_mix(Mix(((4, 0, 0),), (0,))), {"audio": 0.1}, 1)
    with pytest.raises(ValueError, match="must be a share"):
        ConditioningConfig(dropout={"text": 1.2})


def test_each_epoch_draws_one_of_the_captions(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for i in range(6):
            captions = [f"{i} {k}" for k in range(1 + i % 3)]
            text = torch.tensor([float(k) for k in range(1 + i % 3)]).view(-1, 1, 1)
            writer.add([str(i)], [captions], torch.ones(1, *SHAPES[0]), Condition({"text": text}))
    dataset = LatentDataset(DataConfig(path=str(tmp_path)))
    found = Counter(
        (int(name), int(text))
        for batch in islice(LatentLoader(dataset, batch_size=6, seed=0), 300)
        for name, text in zip(batch.ids, batch.cond.tensors["text"][:, 0, 0], strict=True)
    )
    for i in range(6):
        several = 1 + i % 3
        for k in range(several):
            assert abs(found[i, k] / 300 - 1 / several) < 0.12


def test_buckets_of_one_size_have_orders_of_their_own(open_mix):
    loader = LatentLoader(open_mix(Mix(((10, 10, 0),), (0,))), batch_size=10, seed=0)
    orders = {batch.ids[0][0]: [name[2:] for name in batch.ids] for batch in islice(loader, 2)}
    assert orders["0"] != orders["1"]
