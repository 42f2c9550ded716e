"""From decoded clips and captions to rows of a data set, through VAE and text encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from attrs import define, field, frozen
from distill_conditioning import (
    ConditionCache,
    ReportLine,
    ShardEntry,
    ShardRows,
    UnitFolder,
    UnitRecord,
)
from distill_conditioning.writing import DTYPES, LatentDtype, check_finite
from distill_media import ClipShape, MediaClip, MediaError, MediaItem, StoredSample
from distill_protocols import (
    Condition,
    ConditioningError,
    DataError,
    DistillAdapter,
    Fingerprint,
)
from torch import Tensor


def to_video(frames: Sequence[MediaClip]) -> Tensor:
    """Stack clips of one shape as the adapter takes them: [B, 3, F, H, W] in [0, 1]."""
    stacked = torch.stack([torch.from_numpy(clip.frames) for clip in frames])
    return stacked.permute(0, 4, 1, 2, 3).float() / 255


@frozen(kw_only=True)
class StoredShapes:
    """What samples that were encoded elsewhere must fit.

    Attributes:
        text: name of the condition tensor that their text is; ``text_shape`` [L, D].
    """

    text: str
    text_shape: tuple[int, ...]
    latent_shapes: tuple[tuple[int, ...], ...]


@frozen(eq=False, kw_only=True)
class Encoder:
    """The adapter, and how it is used.

    Attributes:
        several_sizes: the clips of the model have more than one.
        cache: folder of encoded captions; None: none are kept.
        fingerprint: of text encoder and tokenizer.
        stored: None: samples are encoded here.
    """

    adapter: DistillAdapter
    first_frames: bool
    several_sizes: bool = False
    dtype: LatentDtype
    cache: Path | None
    fingerprint: Fingerprint
    stored: StoredShapes | None = None

    def encode_clips(self, clips: Sequence[MediaClip]) -> tuple[Tensor, Tensor]:
        """Return raw latents [B, C, T, H, W] as they will be stored, and the videos.

        Raises:
            DataError: a latent is not finite.
        """
        videos = to_video(clips)
        latents = self.adapter.encode(videos).detach().to("cpu", DTYPES[self.dtype])
        check_finite([clip.id for clip in clips], latents, "latents")
        return latents, videos

    def add_first_frames(self, rows: Condition, video: Tensor) -> Condition:
        """Add what the model reads of the first frame of ``video`` [3, F, H, W] to each row.

        Raises:
            ConditioningError: the model reads none.
        """
        images = self.adapter.images
        if images is None:
            raise ConditioningError(
                "first frames are asked for, but this family reads text alone; they would have no "
                "effect. Leave first_frames out, or use an image-to-video model"
            )
        pictures = video[None, :, 0].expand(len(rows), -1, -1, -1)
        if self.several_sizes:
            return images.with_image(rows, pictures, video.shape[1]).to("cpu")
        return images.with_image(rows, pictures).to("cpu")


@define(eq=False)
class CaptionTable:
    """The conditions of the captions of one unit, each encoded once."""

    encoder: Encoder
    rows: dict[str, Condition] = field(factory=dict)
    digests: dict[str, str] = field(factory=dict)
    _cache: ConditionCache = field(init=False)

    def __attrs_post_init__(self) -> None:
        # One for each unit, so that what it keeps in memory ends with the unit.
        self._cache = ConditionCache(self.encoder.cache)

    def of(self, captions: Sequence[str]) -> Condition:
        """Return a row for each caption."""
        return Condition.cat([self.rows[caption] for caption in captions])

    def encode(self, captions: Sequence[str]) -> None:
        """Encode those that are new."""
        new = [text for text in dict.fromkeys(captions) if text not in self.rows]
        if not new:
            return
        encode = self.encoder.adapter.encode_condition
        rows = self._cache.rows(new, "prompt", self.encoder.fingerprint, encode)
        for text, row in zip(new, rows, strict=True):
            self.rows[text] = row
            self.digests[text] = _digest(row)


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
        for first in range(0, len(items), self.batch_size):
            batch = items[first : first + self.batch_size]
            self.captions.encode([caption for item in batch for caption in item.captions])
            for item in batch:
                self._add(item.id, item.captions, self.captions.of(item.captions), None, None)

    def add_stored(self, item: MediaItem, sample: StoredSample) -> None:
        """Add a sample that was encoded elsewhere.

        Raises:
            MediaError: its shapes are not those of the models.
        """
        stored = self.encoder.stored
        assert stored is not None
        length, width = stored.text_shape
        text = torch.from_numpy(sample.text)
        if text.shape[1] != width or len(text) > length:
            raise MediaError(
                item.id,
                f"its text embedding is {list(text.shape)}, and the models take [{length}, "
                f"{width}], or fewer rows. Use data of the same text encoder and length",
            )
        shape = None if sample.latents is None else tuple(sample.latents.shape)
        if shape is not None and shape not in stored.latent_shapes:
            known = " or ".join(str(list(own)) for own in stored.latent_shapes)
            raise MediaError(
                item.id,
                f"its latents are {list(shape)}, and the models take {known}. Use data of that "
                "size, or give pipeline_config theirs",
            )
        # The padding of a text is exact zeros, in Wan's pipeline as here.
        row = Condition({stored.text: torch.zeros(1, length, width)})
        row.tensors[stored.text][0, : len(text)] = text
        for caption in item.captions:
            self.captions.digests[caption] = _digest(row)
        latent = None
        if sample.latents is not None:
            latent = torch.from_numpy(sample.latents).to(DTYPES[self.encoder.dtype])
            check_finite([item.id], latent[None], "latents")
        self._add(item.id, item.captions, row, shape, latent)

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
        adapter = self.encoder.adapter
        fingerprint = {**adapter.latent_fingerprint(), **adapter.condition_fingerprint()}
        if self.encoder.stored is not None:
            fingerprint = {}  # nobody knows what computed these
        record = UnitRecord(
            shards=tuple(self._shards),
            report=tuple(report),
            embeddings=self.captions.digests,
            fingerprint=fingerprint,
        )
        self.folder.finish_unit(self.unit, record)

    def _encode(self, shape: ClipShape) -> None:
        batch = self._batches.pop(shape, [])
        if not batch:
            return
        clips = [clip for _, clip in batch]
        try:
            latents, videos = self.encoder.encode_clips(clips)
        except DataError as error:
            raise DataError(f"{', '.join(clip.id for clip in clips)}: {error}") from error
        self.captions.encode([caption for item, _ in batch for caption in item.captions])
        for (item, clip), latent, video in zip(batch, latents, videos, strict=True):
            rows = self.captions.of(item.captions)
            if self.encoder.first_frames:
                rows = self.encoder.add_first_frames(rows, video)
            self._add(clip.id, item.captions, rows, shape, latent)

    def _add(
        self,
        name: str,
        captions: Sequence[str],
        rows: Condition,
        shape: object,
        latent: Tensor | None,
    ) -> None:
        shard = self._rows.setdefault(shape, ShardRows())
        # Copied: a view would keep the whole batch in memory.
        columns = {} if latent is None else {"latents": latent.clone()}
        shard.add(name, captions, rows, columns)
        if shard.bytes >= self.shard_bytes:
            self._write(shape)

    def _write(self, shape: object) -> None:
        rows = self._rows.pop(shape)
        self._shards.append(self.folder.write_shard(self.unit, len(self._shards), rows))
