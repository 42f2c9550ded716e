"""Order, split, resume and dropout of the loader, as properties."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_conditioning import DataConfig, LatentDataset, LatentLoader
from distill_conditioning import loader as loader_module
from distill_protocols import Batch, Condition, ConditioningError, DataError
from hypothesis import given
from hypothesis import strategies as st

sizes = st.integers(1, 23)
batch_sizes = st.integers(1, 5)
world_sizes = st.integers(1, 4)
seeds = st.integers(0, 2**63 - 1)


def _numbers(batch: Batch) -> list[int]:
    return [int(name.removeprefix("clip-")) for name in batch.ids]


def _stream(loader: LatentLoader, batches: int) -> list[int]:
    return [number for batch in islice(loader, batches) for number in _numbers(batch)]


def _dropped(batch: Batch, negative: Condition) -> list[bool]:
    same = batch.cond.tensors["text"] == negative.tensors["text"]
    return same.flatten(1).all(dim=1).tolist()


def _equal(a: Batch, b: Batch) -> bool:
    text = torch.equal(a.cond.tensors["text"], b.cond.tensors["text"])
    return a.ids == b.ids and torch.equal(a.latents, b.latents) and text


def _negative(dataset: LatentDataset) -> Condition:
    stored = dataset.negative()
    assert stored is not None
    return stored.condition


def _dropping(dataset: LatentDataset, rate: float = 0.4, **place: Any) -> LatentLoader:
    return LatentLoader(dataset, dropout=rate, negative=_negative(dataset), **place)


def test_a_batch_holds_the_latents_and_text_of_its_ids(dataset_of):
    dataset = dataset_of(11)
    texts = dataset.read(torch.arange(11)).cond.tensors["text"]
    for batch in islice(LatentLoader(dataset, batch_size=4, seed=0), 6):
        numbers = _numbers(batch)
        assert batch.latents.dtype == torch.float32
        assert batch.latents[:, 0, 0, 0, 0].tolist() == numbers
        assert torch.equal(batch.cond.tensors["text"], texts[numbers])


@given(samples=sizes, batch_size=batch_sizes, seed=seeds, epochs=st.integers(1, 3))
def test_each_epoch_is_a_permutation(dataset_of, samples, batch_size, seed, epochs):
    loader = LatentLoader(dataset_of(samples), batch_size=batch_size, seed=seed)
    stream = _stream(loader, -(-samples * epochs // batch_size))
    for epoch in range(epochs):
        part = stream[epoch * samples : (epoch + 1) * samples]
        assert sorted(part) == list(range(samples))


@given(seed=seeds)
def test_epochs_and_seeds_differ(dataset_of, seed):
    dataset = dataset_of(23)
    stream = _stream(LatentLoader(dataset, batch_size=23, seed=seed), 2)
    other = _stream(LatentLoader(dataset, batch_size=23, seed=seed + 1), 1)
    assert stream[:23] != stream[23:]
    assert stream[:23] != other


def test_without_shuffling_the_order_is_the_stored_one(dataset_of):
    loader = LatentLoader(dataset_of(5, shuffle=False), batch_size=3, seed=0)
    assert _stream(loader, 4) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


@given(samples=sizes, batch_size=batch_sizes, world_size=world_sizes, seed=seeds)
def test_ranks_share_out_the_global_batch_without_overlap_or_loss(
    dataset_of, samples, batch_size, world_size, seed
):
    dataset = dataset_of(samples)
    ranks = [
        LatentLoader(dataset, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    alone = LatentLoader(dataset, batch_size=batch_size * world_size, seed=seed)
    for batch, *parts in islice(zip(alone, *ranks, strict=False), 5):
        assert sorted(_numbers(batch)) == sorted(n for part in parts for n in _numbers(part))
    assert {str(loader.state_dict()) for loader in [alone, *ranks]} == {str(alone.state_dict())}


@given(
    samples=sizes,
    batch_size=batch_sizes,
    world_size=world_sizes,
    seed=seeds,
    stop=st.integers(0, 9),
    data=st.data(),
)
def test_resuming_anywhere_equals_never_stopping(
    dataset_of, samples, batch_size, world_size, seed, stop, data
):
    dataset = dataset_of(samples)

    def loader() -> LatentLoader:
        place = {"rank": data_rank, "world_size": world_size}
        return _dropping(dataset, batch_size=batch_size, seed=seed, **place)

    data_rank = data.draw(st.integers(0, world_size - 1))
    full = list(islice(loader(), stop + 4))
    first = loader()
    list(islice(first, stop))
    second = loader()
    list(islice(second, 2))  # a loader that has moved must go to the position of the state too
    second.load_state_dict(first.state_dict())
    assert all(_equal(a, b) for a, b in zip(full[stop:], islice(second, 4), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterator_under_way_follows_a_loaded_position(dataset_of, workers):
    loader = LatentLoader(dataset_of(7, workers=workers), batch_size=2, seed=0)
    batches = iter(loader)
    full = []
    for _ in range(9):
        full.append((loader.state_dict(), next(batches)))
    for state, batch in (full[8], full[0], full[7], full[3]):
        loader.load_state_dict(state)
        assert _equal(next(batches), batch)


starts = st.tuples(st.sampled_from([1, 2, 4]), batch_sizes, st.integers(1, 3), st.integers(0, 2))
"""(ranks, batch size of each, batches that it gives, workers)."""


@given(samples=sizes, seed=seeds, path=st.lists(starts, min_size=2, max_size=4))
def test_other_numbers_of_ranks_go_on_in_the_same_stream(dataset_of, samples, seed, path):
    """Nothing is lost or given twice, over the ends of epochs too, and dropout is the same."""

    def loader(workers: int, batch_size: int, rank: int = 0, ranks: int = 1) -> LatentLoader:
        dataset, place = dataset_of(samples, workers=workers), {"rank": rank, "world_size": ranks}
        return _dropping(dataset, batch_size=batch_size, seed=seed, **place)

    def rows(batch: Batch) -> list[tuple[int, bool]]:
        return list(zip(_numbers(batch), _dropped(batch, negative), strict=True))

    negative = _negative(dataset_of(samples))
    position, stream = loader(0, 1).state_dict(), []
    for ranks, batch_size, batches, workers in path:
        loaders = [loader(workers, batch_size, rank, ranks) for rank in range(ranks)]
        for each in loaders:
            each.load_state_dict(position)
        for parts in islice(zip(*loaders, strict=True), batches):
            in_turn = zip(*map(rows, parts), strict=True)
            stream += [row for rows_of_all in in_turn for row in rows_of_all]
        position, *others = [each.state_dict() for each in loaders]
        assert all(other == position for other in others)
    alone = loader(0, 1)
    assert stream == [row for batch in islice(alone, len(stream)) for row in rows(batch)]
    assert position == alone.state_dict()


@pytest.mark.parametrize(
    ("samples", "seed", "shuffle", "word"),
    [
        (8, 0, True, "7 samples and has 8"),
        (7, 1, True, "seed was 0"),
        (7, 0, False, "shuffle was True"),
    ],
)
def test_a_position_of_another_order_is_refused(dataset_of, samples, seed, shuffle, word):
    state = LatentLoader(dataset_of(7), batch_size=2, seed=0).state_dict()
    loader = LatentLoader(dataset_of(samples, shuffle), batch_size=2, seed=seed)
    with pytest.raises(DataError, match=rf"{word}.*another output_dir"):
        loader.load_state_dict(state)


# -- workers ----------------------------------------------------------------------------------


@given(
    samples=sizes,
    batch_size=batch_sizes,
    world_size=world_sizes,
    seed=seeds,
    workers=st.integers(1, 3),
    epochs=st.integers(1, 3),
    data=st.data(),
)
def test_workers_change_no_batch(
    dataset_of, samples, batch_size, world_size, seed, workers, epochs, data
):
    rank = data.draw(st.integers(0, world_size - 1))

    def loader(workers: int) -> LatentLoader:
        dataset = dataset_of(samples, workers=workers)
        place = {"rank": rank, "world_size": world_size}
        return _dropping(dataset, batch_size=batch_size, seed=seed, **place)

    plain, threaded = loader(0), loader(workers)
    global_state = torch.get_rng_state()
    count = -(-epochs * samples // (batch_size * world_size)) + 1
    full = []
    for a, b in islice(zip(plain, threaded, strict=True), count):
        assert _equal(a, b)
        assert plain.state_dict() == threaded.state_dict()
        full.append((plain.state_dict(), a))
    assert torch.equal(torch.get_rng_state(), global_state)

    # From any position, and from a loader with another number of workers, into one that moves.
    stop = data.draw(st.integers(0, count - 1))
    other = loader(data.draw(st.integers(0, 3)))
    batches = iter(other)
    next(batches)
    other.load_state_dict(full[stop][0])
    for _, batch in full[stop + 1 :]:
        assert _equal(next(batches), batch)


class _Watched(LatentDataset):
    """Counts its reads, and the threads that they were made in."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self.reads = 0
        self.threads: set[str] = set()

    def read(self, samples: torch.Tensor, choices: torch.Tensor | None = None, **clip) -> Batch:
        self.threads.add(threading.current_thread().name)
        batch = super().read(samples, choices, **clip)
        self.reads += 1
        return batch


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("workers", [1, 2])
def test_two_batches_a_worker_are_read_ahead_and_none_counts_as_given(
    make_folder, tmp_path, workers
):
    dataset = _Watched(DataConfig(path=str(make_folder(tmp_path / "data", 40)), workers=workers))
    loader = LatentLoader(dataset, batch_size=2, seed=0)
    batches = iter(loader)
    for given_out in range(1, 4):
        next(batches)
        _until(lambda given_out=given_out: dataset.reads == given_out + 2 * workers)
        assert loader.state_dict()["samples_given"] == 2 * given_out
    assert all(name.startswith("data-worker") for name in dataset.threads)


def test_workers_end_with_their_loader(make_folder, tmp_path):
    def alive() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("data-worker")]

    _until(lambda: not alive())  # those of other tests
    dataset = LatentDataset(DataConfig(path=str(make_folder(tmp_path / "data", 9)), workers=2))
    loader = LatentLoader(dataset, batch_size=2, seed=0)
    assert not alive()
    batches = iter(loader)
    next(batches)
    assert alive()
    del loader, batches
    _until(lambda: not alive())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanished_is_named_when_its_batch_is_due(make_folder, tmp_path, workers):
    folder: Path = make_folder(tmp_path / "data", 12)
    config = DataConfig(path=str(folder), shuffle=False, workers=workers)
    dataset = LatentDataset(config)
    first, last = dataset.sources[0].index.shards[0], dataset.sources[0].index.shards[-1]
    (folder / last.file).unlink()
    loader = LatentLoader(dataset, batch_size=1, seed=0)
    full = 12 - last.samples
    assert full >= first.samples
    assert _stream(loader, full) == list(range(full))
    for _ in range(2):  # asked again, it must not be left out
        with pytest.raises(DataError, match=last.file):
            next(iter(loader))
        assert loader.state_dict()["samples_given"] == full


@pytest.mark.parametrize("workers", [-1, 65])
def test_a_number_of_workers_that_makes_no_sense_is_refused(workers):
    with pytest.raises(ValueError, match=rf"{workers} must be within \[0, 64\]: each worker is"):
        DataConfig(path="data", workers=workers)


# -- dropout ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_rate(dataset_of, rate):
    dataset = dataset_of(23)
    negative = _negative(dataset)
    loader = LatentLoader(dataset, batch_size=230, seed=3, dropout=rate, negative=negative)
    dropped = [d for batch in islice(loader, 20) for d in _dropped(batch, negative)]
    deviation = (rate * (1 - rate) / len(dropped)) ** 0.5
    assert abs(sum(dropped) / len(dropped) - rate) < 4 * deviation


@pytest.mark.parametrize(("rate", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_dropout_never_and_always(dataset_of, rate, share):
    dataset = dataset_of(23)
    negative = _negative(dataset)
    loader = LatentLoader(dataset, batch_size=100, seed=3, dropout=rate, negative=negative)
    dropped = [d for batch in islice(loader, 5) for d in _dropped(batch, negative)]
    assert sum(dropped) / len(dropped) == share


@given(samples=sizes, batch_size=batch_sizes, world_size=world_sizes, seed=seeds)
def test_dropout_knows_only_seed_epoch_and_sample(
    dataset_of, samples, batch_size, world_size, seed
):
    dataset = dataset_of(samples)
    negative = _negative(dataset)

    def decisions(batch_size: int, world_size: int, batches: int) -> dict[tuple[int, int], bool]:
        # Only the loader knows the epoch; here it follows from the position.
        dropped: dict[tuple[int, int], bool] = {}
        for rank in range(world_size):
            place = {"rank": rank, "world_size": world_size}
            loader = _dropping(dataset, 0.5, batch_size=batch_size, seed=seed, **place)
            for number, batch in enumerate(islice(loader, batches)):
                first = number * batch_size * world_size + rank
                rows = zip(_numbers(batch), _dropped(batch, negative), strict=True)
                for row, (sample, is_dropped) in enumerate(rows):
                    epoch = (first + row * world_size) // samples
                    dropped[epoch, sample] = is_dropped
        return dropped

    one = decisions(1, 1, 2 * samples)
    cut = decisions(batch_size, world_size, -(-2 * samples // (batch_size * world_size)))
    assert one == {key: value for key, value in cut.items() if key[0] < 2}


def test_other_samples_are_dropped_in_another_epoch(dataset_of):
    dataset = dataset_of(23, shuffle=False)
    negative = _negative(dataset)
    loader = LatentLoader(dataset, batch_size=23, seed=0, dropout=0.5, negative=negative)
    first, second = (_dropped(batch, negative) for batch in islice(loader, 2))
    assert first != second
    assert len(set(first)) == 2


def test_dropout_leaves_latents_ids_and_the_data_set_alone(dataset_of):
    dataset = dataset_of(9)
    before = dataset.read(torch.arange(9))
    plain = LatentLoader(dataset, batch_size=9, seed=0)
    dropping = LatentLoader(dataset, batch_size=9, seed=0, dropout=1.0, negative=_negative(dataset))
    a, b = next(iter(plain)), next(iter(dropping))
    assert a.ids == b.ids
    assert torch.equal(a.latents, b.latents)
    assert _equal(before, dataset.read(torch.arange(9)))


@given(batch_size=batch_sizes, world_size=world_sizes, seed=seeds)
def test_one_of_several_negatives_knows_only_seed_epoch_and_sample(
    dataset_of, batch_size, world_size, seed
):
    negatives = Condition({"text": torch.arange(3.0)[:, None, None].expand(3, 3, 4)})

    def first_epoch(batch_size: int, world_size: int) -> dict[int, float]:
        chosen: dict[int, float] = {}
        for rank in range(world_size):
            loader = LatentLoader(
                dataset_of(23), batch_size=batch_size, seed=seed, dropout=1.0, negative=negatives,
                rank=rank, world_size=world_size,
            )  # fmt: skip
            for number, batch in enumerate(islice(loader, -(-23 // (batch_size * world_size)))):
                first = number * batch_size * world_size + rank
                text = batch.cond.tensors["text"]
                assert torch.equal(text, text[:, :1, :1].expand_as(text))
                for row, sample in enumerate(_numbers(batch)):
                    if first + row * world_size < 23:
                        chosen[sample] = float(text[row, 0, 0])
        return chosen

    whole = first_epoch(23, 1)
    assert first_epoch(batch_size, world_size) == whole
    assert set(whole.values()) <= {0.0, 1.0, 2.0}


def test_several_negatives_are_drawn_equally_often_and_anew(dataset_of):
    negatives = Condition({"text": torch.arange(3.0)[:, None, None].expand(3, 3, 4)})
    loader = LatentLoader(
        dataset_of(23, shuffle=False), batch_size=23, seed=1, dropout=1.0, negative=negatives
    )
    epochs = [batch.cond.tensors["text"][:, 0, 0] for batch in islice(loader, 60)]
    assert not torch.equal(epochs[0], epochs[1])
    share = torch.stack(epochs).flatten().long().bincount() / (23 * 60)
    assert (share - 1 / 3).abs().max() < 4 * (2 / 9 / (23 * 60)) ** 0.5


def test_dropout_without_a_fitting_negative_is_refused(dataset_of):
    dataset = dataset_of(5)
    with pytest.raises(ConditioningError, match="negative_prompt"):
        LatentLoader(dataset, batch_size=2, seed=0, dropout=0.1)
    wrong = Condition({"text": torch.zeros(1, 3, 9)})
    with pytest.raises(ConditioningError, match=r"\(1, 3, 9\).*\(1, 3, 4\)"):
        LatentLoader(dataset, batch_size=2, seed=0, dropout=0.1, negative=wrong)


# -- devices ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "copies"), [("cpu", 0), ("meta", 2)])
def test_batches_reach_an_accelerator_through_pinned_memory(
    dataset_of, monkeypatch, device, copies
):
    """``meta`` stands for the accelerator: latents and text are pinned, on the CPU nothing is."""
    pinned = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("meta"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    batch = next(iter(LatentLoader(dataset_of(5), batch_size=2, seed=0, device=device)))
    assert len(pinned) == copies
    tensors = [batch.latents, *batch.cond.tensors.values()]
    assert {value.device.type for value in tensors} == {device}


@pytest.mark.parametrize("workers", [0, 2])
def test_orders_of_epochs_that_are_over_are_let_go(dataset_of, monkeypatch, workers):
    """A run of a thousand epochs holds those that it reads, and no more."""
    orders = weakref.WeakSet()
    draw = loader_module.epoch_order

    def watched(*args, **options):
        order = draw(*args, **options)
        orders.add(order)
        return order

    monkeypatch.setattr(loader_module, "epoch_order", watched)
    dataset = dataset_of(6, workers=workers)
    loader = LatentLoader(dataset, batch_size=2, seed=0)
    most = 0
    for _ in islice(loader, 30):  # ten epochs
        most = max(most, len(orders))
    assert most <= 3 + workers
