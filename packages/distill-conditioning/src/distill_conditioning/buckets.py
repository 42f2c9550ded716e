"""Samples that can be batched with each other, and how far a run is in them. No torch here.

A **bucket** holds the samples of one data set that share a shape. A **group** is the samples of one
iteration, those of all micro steps and ranks, and comes from one bucket (``order.BucketOrder``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import cast

from attrs import evolve, frozen
from distill_protocols import DataError

from distill_conditioning.format import DatasetIndex, SampleShape, content_hash


@frozen(kw_only=True)
class DataSource:
    """One data set of those that a run is trained on.

    Attributes:
        name: its samples' ids begin with it, if there are several data sets.
        weight: its share of all samples, relative to the other data sets'; None: its size.
    """

    name: str
    path: Path
    index: DatasetIndex
    weight: float | None = None


@frozen(kw_only=True)
class Bucket:
    """The samples of one data set that share a shape.

    Attributes:
        key: what its order and dropout are drawn by, beside the seed; empty if it is the only one.
        numbers: of its samples, counted through all data sets.
        share: of all samples that are read.
    """

    key: tuple[str, ...]
    shape: SampleShape
    numbers: tuple[range, ...]
    share: Fraction

    def __len__(self) -> int:
        return sum(map(len, self.numbers))


def make_buckets(sources: Sequence[DataSource]) -> tuple[Bucket, ...]:
    """Make the buckets of data sets whose samples are counted through in this order."""
    total = sum((_weight(source) for source in sources), Fraction())
    buckets: list[Bucket] = []
    first = 0
    for source in sources:
        numbers: list[list[range]] = [[] for _ in source.index.shapes]
        for shard in source.index.shards:
            spans = numbers[source.index.shapes.index(shard.shape)]
            spans.append(range(first, first + shard.samples))
            first += shard.samples
        for shape, spans in zip(source.index.shapes, numbers, strict=True):
            part = Fraction(sum(map(len, spans)), source.index.samples)
            name = source.name if len(sources) > 1 else ""
            size = "x".join(map(str, shape.latents or ()))
            bucket = Bucket(
                key=(name, size),
                shape=shape,
                numbers=tuple(spans),
                share=part * _weight(source) / total,
            )
            if len(bucket):
                buckets.append(bucket)
    return tuple(buckets) if len(buckets) > 1 else (evolve(buckets[0], key=()),)


def count_held_out(samples: int, share: float) -> int:
    """Return how many samples of a bucket are held out; one at least is left to train on."""
    return min(round(samples * share), samples - 1)


def _weight(source: DataSource) -> Fraction:
    # By its digits: 0.1 is a tenth here, and the order of a file's weights is that of its text.
    return Fraction(source.index.samples if source.weight is None else str(source.weight))


@frozen(kw_only=True)
class Position:
    """How far all ranks together are.

    Attributes:
        taken: samples of each bucket, before the group under way.
        groups: those before it.
        offset: samples of it that were given.
    """

    taken: tuple[int, ...]
    groups: int = 0
    offset: int = 0

    @property
    def samples(self) -> int:
        """All samples that were given."""
        return sum(self.taken) + self.offset


# -- positions in checkpoints ---------------------------------------------------------------------


def describe_order(
    sources: Sequence[DataSource], *, seed: int, shuffle: bool, held_out: float = 0.0
) -> dict[str, object]:
    """Describe what decides the order of samples, as a checkpoint records it (JSON).

    Args:
        held_out: share of the samples that is not trained on.
    """
    decided: dict[str, object] = {"seed": seed, "shuffle": shuffle}
    if held_out:
        decided["held_out"] = held_out
    if len(sources) == 1:
        [source] = sources
        content = content_hash(source.path, source.index)
        return {**decided, "dataset_samples": source.index.samples, "dataset": content}
    sets = {
        source.name: {
            "content": content_hash(source.path, source.index),
            "samples": source.index.samples,
            "weight": source.weight,
        }
        for source in sources
    }
    return {**decided, "sets": sets}


def save_position(
    position: Position, buckets: Sequence[Bucket], group_size: int | None
) -> dict[str, object]:
    """Return the part of a checkpoint that describes how far a run is (JSON).

    Args:
        group_size: samples in a group; None where nothing depends on groups, and the number of
            samples says all.
    """
    given: dict[str, object] = {"samples_given": position.samples}
    if group_size is None:
        return given
    taken = {_name(bucket): n for bucket, n in zip(buckets, position.taken, strict=True)}
    groups = {"number": position.groups, "offset": position.offset, "size": group_size}
    return {**given, "buckets": taken, "group": groups}


def load_position(
    state: Mapping[str, object], buckets: Sequence[Bucket], *, group_size: int | None, stride: int
) -> Position:
    """Return the position that ``save_position`` saved.

    Args:
        stride: samples of all ranks in a micro step.

    Raises:
        DataError: of a position within a group: the group was of another size, or ends within a
            micro step.
    """
    if group_size is None or "group" not in state:  # one bucket, now or then
        return Position(taken=(int(cast(int, state["samples_given"])),))
    taken = cast(Mapping[str, int], state["buckets"])
    group = cast(Mapping[str, int], state["group"])
    position = Position(
        taken=tuple(taken[_name(bucket)] for bucket in buckets),
        groups=group["number"],
        offset=group["offset"],
    )
    if position.offset and (group["size"] != group_size or (group_size - position.offset) % stride):
        raise DataError(
            f"the position is {position.offset} samples within a group of {group['size']}, and "
            f"this run reads groups of {group_size} by {stride}; all samples of a group have one "
            "shape, so it must be read to its end first. Go on with the batch sizes of then, or "
            "from a checkpoint between two iterations."
        )
    return position


def _name(bucket: Bucket) -> str:
    return "/".join(filter(None, bucket.key))


def position_problem(saved: Mapping[str, object], own: Mapping[str, object]) -> str | None:
    """Say why a loader's position in ``saved`` means nothing to a run; None: it does.

    Args:
        saved: ``LatentLoader.state_dict()`` of then; what an earlier release did not save is not
            compared.
        own: ``describe_order`` of the run.
    """
    texts = {
        "dataset_samples": "the data set had {} samples and has {}",
        "dataset": "the data set holds other samples (its checksum was {:.12} and is {:.12})",
        "seed": "the seed was {} and is {}",
        "shuffle": "shuffle was {} and is {}",
    }
    changed = [
        text.format(str(saved[key]), str(own[key]))
        for key, text in texts.items()
        if key in saved and key in own and saved[key] != own[key]
    ]
    shares = [state.get("held_out", 0.0) for state in (saved, own)]
    if shares[0] != shares[1]:
        changed.append(f"the share of held-out samples was {shares[0]} and is {shares[1]}")
    changed += _changed_sets(_sets(saved), _sets(own))
    if not changed:
        return None
    return (
        f"the data position of the checkpoint does not fit this run: {'; '.join(changed)}. They "
        "decide which samples are still to come, so the run could not go on where it stopped"
    )


def _sets(state: Mapping[str, object]) -> Mapping[str, Mapping[str, object]] | None:
    return cast("Mapping[str, Mapping[str, object]] | None", state.get("sets"))


def _changed_sets(
    before: Mapping[str, Mapping[str, object]] | None,
    now: Mapping[str, Mapping[str, object]] | None,
) -> Iterable[str]:
    if before is None and now is None:
        return
    if before is None or now is None:
        many = ", ".join(before or now or ())
        yield f"one of the two reads one data set, and the other mixes {many}"
        return
    for name in dict.fromkeys([*before, *now]):
        if name not in before or name not in now:
            yield f"the data set {name!r} was {'added' if name in now else 'taken out'}"
        elif before[name] != now[name]:
            (was, of), (other, own) = (
                (str(entry["content"])[:12], entry["weight"]) for entry in (before[name], now[name])
            )
            yield (
                f"the data set {name!r} had weight {of} and checksum {was}, and has {own} and "
                f"{other}"
            )
