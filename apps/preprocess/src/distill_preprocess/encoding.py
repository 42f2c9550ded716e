"""From decoded clips and captions to rows of a data set, through VAE and text encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from attrs import define, field, frozen
from distill_conditioning import (
    ConditionCache,
    ReportLine,
    SampleShape,
    ShardEntry,
    ShardRows,
    UnitFolder,
    UnitRecord,
)
from distill_conditioning.format import TRAJECTORY
from distill_conditioning.preprocessing import add_given_frames
from distill_conditioning.reading import read_conditions
from distill_conditioning.writing import DTYPES, LatentDtype, check_finite
from distill_media import STORED_TEXT, ClipShape, MediaClip, MediaError, MediaItem, StoredSample
from distill_protocols import (
    Condition,
    DataError,
    DistillAdapter,
    Fingerprint,
    GivenFrames,
    LatentShape,
)
from torch import Tensor


def to_video(clips: Sequence[MediaClip], device: torch.device) -> Tensor:
    """Stack clips of one shape as the adapter takes them: [B, 3, F, H, W] in [0, 1]."""
    stacked = torch.stack([torch.from_numpy(clip.frames) for clip in clips])
    # Copied as bytes: an accelerator makes floats of them while a CPU would take a third of a
    # second for each clip of 480p, in which nothing is encoded.
    return stacked.to(device).permute(0, 4, 1, 2, 3).float().div_(255)


@frozen(kw_only=True)
class StoredShapes:
    """What samples that were encoded elsewhere must fit.

    Attributes:
        names: which condition tensor each of their tensors is, by its name there.
        shapes: of samples, one a size of clips.
    """

    names: Mapping[str, str]
    shapes: tuple[SampleShape, ...]

    def shape_of(self, item: MediaItem, sample: StoredSample) -> SampleShape:
        """Return the shape that ``sample`` is of.

        Raises:
            MediaError: there is none.
        """
        if sample.latents is None:
            return self.shapes[0]
        for shape in self.shapes:
            if shape.latents == sample.latents.shape:
                return shape
        known = " or ".join(str(list(own.latents or ())) for own in self.shapes)
        raise MediaError(
            item.id,
            f"its latents are {list(sample.latents.shape)}, and the models take {known}. Use data "
            "of that size, or give pipeline_config theirs",
        )

    def condition(self, item: MediaItem, sample: StoredSample) -> Condition:
        """Return the condition of ``sample``, one row.

        Raises:
            MediaError: a tensor of it is of another shape than the models'.
        """
        shapes = self.shape_of(item, sample).conditions
        tensors = {}
        for theirs, ours in self.names.items():
            value, shape = torch.from_numpy(sample.conditions[theirs]), shapes[ours]
            is_text = theirs == STORED_TEXT
            length = min(len(value), shape[0]) if is_text else shape[0]
            if tuple(value.shape) != (length, *shape[1:]):
                raise MediaError(
                    item.id,
                    f"its {theirs.replace('_', ' ')} is {list(value.shape)}, and the models take "
                    f"{list(shape)}{', or fewer rows' if is_text else ''}. Use data of the same "
                    "encoders and sizes",
                )
            # The padding of a text is exact zeros, in Wan's pipeline as here.
            tensors[ours] = torch.zeros(1, *shape)
            tensors[ours][0, :length] = value
        return Condition(tensors)


@frozen(kw_only=True)
class PairShapes:
    """What ODE pairs must fit: the number of their states, and the sizes of clips."""

    states: int
    latents: tuple[LatentShape, ...]

    def check(self, item: MediaItem, states: Tensor) -> None:
        """Compare the states [S, C, T, H, W] of a pair.

        Raises:
            MediaError: their number or size is another than the run's.
        """
        if len(states) != self.states:
            raise MediaError(
                item.id,
                f"it has {len(states)} states, and times names {self.states - 1} levels beside the "
                "clip itself, which is the last. Write the level of each",
            )
        if tuple(states.shape[1:]) not in self.latents:
            raise MediaError(
                item.id,
                f"its states are {list(states.shape[1:])} [C, T, H, W], and the models take "
                f"{' or '.join(str(list(own)) for own in self.latents)}. Give pipeline_config "
                "their size",
            )


@frozen(eq=False, kw_only=True)
class Encoder:
    """The adapter, and how it is used.

    Attributes:
        device: where clips are encoded.
        given: frames of each clip that become part of its condition.
        cache: folder of encoded captions; None: none are kept.
        fingerprint: of text encoder and tokenizer.
        stored: None: samples are encoded here.
        pairs: None: there are no ODE pairs.
    """

    adapter: DistillAdapter
    device: torch.device
    given: GivenFrames
    dtype: LatentDtype
    cache: Path | None
    fingerprint: Fingerprint
    stored: StoredShapes | None = None
    pairs: PairShapes | None = None

    def data_fingerprint(self) -> Fingerprint:
        """Name what computes the data set, as far as it is known: of latents and texts that were
        encoded elsewhere nothing."""
        if self.stored is not None:
            return {}
        texts = self.adapter.condition_fingerprint()
        return texts if self.pairs is not None else {**self.adapter.latent_fingerprint(), **texts}

    def encode_clips(self, clips: Sequence[MediaClip]) -> Tensor:
        """Return raw latents [B, C, T, H, W] as they will be stored.

        Raises:
            DataError: a latent is not finite.
        """
        videos = to_video(clips, self.device)
        latents = self.adapter.encode(videos).detach().to("cpu", DTYPES[self.dtype])
        check_finite([clip.id for clip in clips], latents, "latents")
        return latents

    def add_given_frames(self, rows: Condition, clip: MediaClip) -> Condition:
        """Add what the model reads of the given frames of ``clip`` to each row.

        Raises:
            ConditioningError: the model reads no such frames.
        """
        videos = to_video([clip], torch.device("cpu")).expand(len(rows), -1, -1, -1, -1)
        return add_given_frames(self.adapter.images, rows, videos, self.given).to("cpu")


@define(eq=False)
class CaptionTable:
    """The conditions of the captions of one unit, each encoded once.

    Attributes:
        digests: of the rows that samples have.
    """

    encoder: Encoder
    rows: dict[str, Condition] = field(factory=dict)
    digests: dict[str, str] = field(factory=dict)
    _cache: ConditionCache = field(init=False)

    def __attrs_post_init__(self) -> None:
        # One for each unit, so that what it keeps in memory ends with the unit.
        self._cache = ConditionCache(self.encoder.cache)

    def of(self, captions: Sequence[str]) -> Condition:
        """Return a row for each caption."""
        for caption in captions:
            if caption not in self.digests:
                self.digests[caption] = _digest(self.rows[caption])
        return Condition.cat([self.rows[caption] for caption in captions])

    def encode(self, captions: Sequence[str]) -> None:
        """Encode those that are new."""
        new = [text for text in dict.fromkeys(captions) if text not in self.rows]
        if not new:
            return
        encode = self.encoder.adapter.encode_condition
        rows = self._cache.rows(new, "prompt", self.encoder.fingerprint, encode)
        self.rows.update(zip(new, rows, strict=True))

    def save(self, path: Path) -> None:
        """Write all rows to a file, as a shard of captions alone."""
        rows = ShardRows()
        for caption, row in self.rows.items():
            rows.add(caption, caption, row, {})
        rows.write(path)

    def load(self, path: Path) -> None:
        """Take the rows that ``save`` wrote."""
        self.rows.update(read_conditions(path))


def _digest(row: Condition) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(row.tensors.items()):
        digest.update(name.encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@define(eq=False, kw_only=True)
class UnitWriter:
    """Collects the samples of one unit and writes its shards, each of one shape.

    Args:
        batch_size: clips that are encoded together.
        shard_bytes: a shard is written once it holds so much.
    """

    folder: UnitFolder
    unit: int
    encoder: Encoder
    batch_size: int
    shard_bytes: int
    captions: CaptionTable = field(init=False)
    _batches: dict[ClipShape, list[tuple[MediaItem, MediaClip]]] = field(factory=dict)
    _rows: dict[object, ShardRows] = field(factory=dict)
    _shards: list[ShardEntry] = field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.captions = CaptionTable(self.encoder)

    def add_prompts(self, items: Sequence[MediaItem]) -> None:
        """Add samples of captions alone."""
        self.encode_captions(items)
        for item in items:
            self._add(item.id, item.captions, self.captions.of(item.captions), None, {})

    def encode_captions(self, items: Sequence[MediaItem]) -> None:
        """Encode the captions of items, ``batch_size`` items at a time."""
        for first in range(0, len(items), self.batch_size):
            batch = items[first : first + self.batch_size]
            self.captions.encode([caption for item in batch for caption in item.captions])

    def add_stored(self, item: MediaItem, sample: StoredSample) -> None:
        """Add a sample that was encoded elsewhere.

        Raises:
            MediaError: its shapes are not those of the models.
        """
        stored = self.encoder.stored
        assert stored is not None
        row = stored.condition(item, sample)
        shape = None if sample.latents is None else tuple(sample.latents.shape)
        for caption in item.captions:
            self.captions.digests[caption] = _digest(row)
        columns = {}
        if sample.latents is not None:
            columns["latents"] = torch.from_numpy(sample.latents).to(DTYPES[self.encoder.dtype])
            check_finite([item.id], columns["latents"][None], "latents")
        self._add(item.id, item.captions, row, shape, columns)

    def add_pair(self, item: MediaItem, states: Tensor) -> None:
        """Add an ODE pair, whose caption is encoded already.

        Args:
            states: [S, C, T, H, W], normalised; the last one is the clip.

        Raises:
            MediaError: their number or size is another than the run's.
            DataError: a state is not finite.
        """
        assert self.encoder.pairs is not None
        self.encoder.pairs.check(item, states)
        dtype = DTYPES[self.encoder.dtype]
        latents = self.encoder.adapter.denormalize_latents(states[-1:]).cpu().to(dtype)
        states = states.to(dtype)
        for value, what in ((latents, "latents"), (states[None], "states")):
            check_finite([item.id], value, what)
        columns = {"latents": latents[0].clone()}
        if len(states) > 1:
            columns[TRAJECTORY] = states[:-1].clone()
        rows = self.captions.of(item.captions)
        self._add(item.id, item.captions, rows, tuple(latents.shape[1:]), columns)

    def add_clip(self, item: MediaItem, clip: MediaClip) -> None:
        """Add a clip; it is encoded with others of its shape."""
        batch = self._batches.setdefault(clip.shape, [])
        batch.append((item, clip))
        if len(batch) == self.batch_size:
            self._encode(clip.shape)

    def finish(self, report: Sequence[ReportLine]) -> None:
        """Encode what is left, write the last shards and the unit's record."""
        for shape in list(self._batches):
            self._encode(shape)
        for shape in list(self._rows):
            self._write(shape)
        record = UnitRecord(
            shards=tuple(self._shards),
            report=tuple(report),
            embeddings=self.captions.digests,
            fingerprint=self.encoder.data_fingerprint(),
        )
        self.folder.finish_unit(self.unit, record)

    def _encode(self, shape: ClipShape) -> None:
        batch = self._batches.pop(shape, [])
        if not batch:
            return
        clips = [clip for _, clip in batch]
        try:
            latents = self.encoder.encode_clips(clips)
        except DataError as error:
            raise DataError(f"{', '.join(clip.id for clip in clips)}: {error}") from error
        self.captions.encode([caption for item, _ in batch for caption in item.captions])
        for (item, clip), latent in zip(batch, latents, strict=True):
            rows = self.captions.of(item.captions)
            if self.encoder.given:
                rows = self.encoder.add_given_frames(rows, clip)
            # Copied: a view would keep the whole batch in memory.
            self._add(clip.id, item.captions, rows, shape, {"latents": latent.clone()})

    def _add(
        self,
        name: str,
        captions: Sequence[str],
        rows: Condition,
        shape: object,
        columns: Mapping[str, Tensor],
    ) -> None:
        shard = self._rows.setdefault(shape, ShardRows())
        shard.add(name, captions, rows, columns)
        if shard.bytes >= self.shard_bytes:
            self._write(shape)

    def _write(self, shape: object) -> None:
        rows = self._rows.pop(shape)
        self._shards.append(self.folder.write_shard(self.unit, len(self._shards), rows))
