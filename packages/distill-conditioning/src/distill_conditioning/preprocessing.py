"""Making a latent data set from clips and captions, through the encoders of an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Protocol

import torch
from distill_protocols import (
    Condition,
    ConditionEncoder,
    ConditioningError,
    DataError,
    GivenFrames,
    ImageConditioning,
)
from torch import Tensor

from distill_conditioning.writing import ShardWriter

Clip = tuple[str, str, Tensor]
"""id, caption, video [3, F, H_px, W_px] in [0, 1]."""


class ClipEncoder(ConditionEncoder, Protocol):
    """What preprocessing needs of an adapter."""

    @property
    def images(self) -> ImageConditioning | None:
        """Used only where frames are given."""
        ...

    def latent_fingerprint(self) -> Mapping[str, str]:
        """Say what computes latents, as ``LatentCodec.latent_fingerprint``."""
        ...

    def encode(self, video: Tensor) -> Tensor:
        """Encode clips [B, 3, F, H_px, W_px] in [0, 1] as raw posterior means [B, C, T, H, W]."""
        ...


def preprocess(
    clips: Iterable[Clip],
    encoder: ClipEncoder,
    writer: ShardWriter,
    *,
    negative_prompt: str | None,
    batch_size: int = 8,
    first_frames: int = 0,
    last_frame: bool = False,
) -> int:
    """Encode ``clips`` and add them to ``writer``; return their number.

    Args:
        clips: read once, ``batch_size`` at a time; all of one size.
        negative_prompt: encoded into the data set's constants; None leaves them out.
        first_frames: let the encoder add what the model reads of so many first frames of each clip
            to its condition; 1 (or True) for image to video.
        last_frame: and of its last one.

    Raises:
        DataError: a clip of another shape or range, or two of one id.
        DataError: ``writer`` has samples of other encoders.
    """
    with encoder.keep_encoders_loaded():
        writer.record(_fingerprint(encoder))
        if negative_prompt is not None:
            writer.set_negative(negative_prompt, encoder.encode_neg_condition(negative_prompt))
        given = GivenFrames(first=int(first_frames), last=last_frame)
        samples = _add_clips(clips, encoder, writer, batch_size, given)
        # Again: parts that had to be downloaded have a fingerprint only once they were used.
        writer.record(_fingerprint(encoder))
        return samples


def _fingerprint(encoder: ClipEncoder) -> dict[str, str]:
    return {**encoder.latent_fingerprint(), **encoder.condition_fingerprint()}


def add_given_frames(
    images: ImageConditioning | None,
    cond: Condition,
    videos: Tensor,
    given: GivenFrames,
) -> Condition:
    """Add to ``cond`` what a model reads of the given frames of clips.

    Args:
        images: of the adapter.
        videos: [B, 3, F, H_px, W_px] in [0, 1].

    Raises:
        ConditioningError: the models read no such frames.
    """
    if images is None:
        raise ConditioningError(
            "frames of the clips are to be given, but this family reads text alone; they would "
            "have no effect. Leave first_frames out, or use an image-to-video model"
        )
    first = videos[:, :, 0] if given.first == 1 else videos[:, :, : given.first]
    if given.last:
        return images.with_image(cond, first, videos.shape[2], last=videos[:, :, -1])
    return images.with_image(cond, first, videos.shape[2])


def _add_clips(
    clips: Iterable[Clip],
    encoder: ClipEncoder,
    writer: ShardWriter,
    batch_size: int,
    given: GivenFrames,
) -> int:
    seen: set[str] = set()
    for batch in _batches(clips, batch_size):
        ids = [sample for sample, _, _ in batch]
        captions = [caption for _, caption, _ in batch]
        for sample, caption, video in batch:
            _check_clip(sample, caption, video, seen)
        _check_one_size(batch)
        with torch.no_grad():
            videos = torch.stack([video for _, _, video in batch])
            try:
                latents = encoder.encode(videos)
            except DataError as error:
                raise DataError(f"{', '.join(ids)}: {error}") from error
            cond = _encode_captions(encoder, captions)
            if given:
                cond = add_given_frames(encoder.images, cond, videos, given)
            writer.add(ids, captions, latents, cond)
    return len(seen)


def _batches(clips: Iterable[Clip], size: int) -> Iterator[list[Clip]]:
    stream = iter(clips)
    while batch := list(islice(stream, size)):
        yield batch


def _encode_captions(encoder: ConditionEncoder, captions: Sequence[str]) -> Condition:
    """Return one row for each caption; each distinct one is encoded once."""
    distinct = list(dict.fromkeys(captions))
    rows = encoder.encode_condition(distinct)
    return rows[torch.tensor([distinct.index(caption) for caption in captions])]


def _check_one_size(batch: Sequence[Clip]) -> None:
    (first, _, example), *others = batch
    for sample, _, video in others:
        if video.shape != example.shape:
            raise DataError(
                f"{sample}: video is {list(video.shape)} and {first} is {list(example.shape)}; "
                "clips that are encoded together have one size. Bring them to one, or give them "
                "in calls of their own"
            )


def _check_clip(sample: str, caption: object, video: Tensor, seen: set[str]) -> None:
    if not isinstance(caption, str):
        raise DataError(f'{sample}: its caption is {caption!r}; it must be a text. "" is one too')
    if sample in seen:
        raise DataError(f"{sample}: two clips have this id; ids name samples in error messages")
    seen.add(sample)
    if video.ndim != 4 or video.shape[0] != 3:
        raise DataError(f"{sample}: video is {list(video.shape)}; it must be [3, F, H, W]")
    if video.isnan().any():
        raise DataError(f"{sample}: some pixels are nan, and so would all latents be. Leave it out")
    low, high = float(video.min()), float(video.max())
    if not 0 <= low <= high <= 1:
        raise DataError(
            f"{sample}: pixels lie in [{low:g}, {high:g}]; they must lie in [0, 1], which is what "
            "the adapter maps to its VAE's range. Divide 8-bit frames by 255."
        )
