"""From a checked request to files."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from attrs import frozen
from distill_runfile import cli
from distill_runtime import ALONE, RowPartition, counted, device_type
from distill_trainer import Distribution
from distill_trainer.config import DistributedConfig
from torch import Tensor

from distill_sample.files import (
    clip_stem,
    read_pictures,
    read_video_ends,
    thumbnails,
    write_clip,
    write_sheets,
    write_stream,
)
from distill_sample.model import Model, StreamedChunk, load
from distill_sample.record import SampleRecord
from distill_sample.request import Request
from distill_sample.sources import SampleSource

_log = logging.getLogger(__name__)


def run(source: SampleSource, request: Request) -> None:
    """Load the models and write what was asked for; on every rank that torchrun started.

    Raises:
        DistillError: weights, pictures or prompts cannot be used.
        OSError: a file cannot be written.
    """
    with Distribution.start(DistributedConfig(), device_type()) as distribution:
        ranks = distribution.ranks
        if request.latent_frames is not None:
            if not ranks.is_first:  # one video, whose chunks follow from those before
                return
            ranks = ALONE
        request.to.mkdir(parents=True, exist_ok=True)
        model = load(
            source,
            device=distribution.device,
            negative_prompt=request.negative_prompt,
            ranks=ranks,
        )
        _log.info("%s of %s on %s", ", ".join(source.roles), source.name, distribution.device)
        given = _read_given(model, request)
        with model.adapter.keep_encoders_loaded():
            model.prepare(request.prompts)
        if request.latent_frames is not None:
            _stream(model, request, given)
        else:
            _sample(model, request, given, RowPartition(ranks, len(request.prompts)))


@frozen(kw_only=True, eq=False)
class _Given:
    """Frames that are given, one row a prompt: see ``Model.sample``."""

    images: Tensor | None
    last_images: Tensor | None

    def __getitem__(self, rows: list[int]) -> _Given:
        """Return those of some prompts."""
        return _Given(
            images=None if self.images is None else self.images[rows],
            last_images=None if self.last_images is None else self.last_images[rows],
        )


def _read_given(model: Model, request: Request) -> _Given:
    images = last = None
    if request.videos:
        images = read_video_ends(request.videos, request.video_frames, model.clip_size())
    elif request.images:
        images = read_pictures(request.images, model.clip_size())
    if request.last_images:
        last = read_pictures(request.last_images, model.clip_size())
    count = len(request.prompts)
    return _Given(images=_for_each(images, count), last_images=_for_each(last, count))


def _for_each(pictures: Tensor | None, count: int) -> Tensor | None:
    if pictures is None or len(pictures) == count:
        return pictures
    return pictures.expand(count, *pictures.shape[1:])


def _sample(model: Model, request: Request, given: _Given, rows: RowPartition) -> None:
    """Make the clips of this rank's prompts; the first rank draws the sheets of all."""
    record = SampleRecord(model, request)
    rows.ranks.run_on_first(record.remove_former)
    with record.kept(here=rows.ranks.is_first):
        sheet = [
            row
            for role in model.source.roles
            if (row := _sample_role(model, request, given, rows, record, role))
        ]
        if rows.ranks.is_first:
            for path in write_sheets(
                sheet, request.prompts, request.to, format=request.format, fps=request.fps
            ):
                _log.info("%s", path.name)
    if rows.ranks.is_first:
        cli.say(f"{counted(len(request.prompts) * len(sheet), 'clip')} in {request.to}")


def _sample_role(
    model: Model,
    request: Request,
    given: _Given,
    rows: RowPartition,
    record: SampleRecord,
    role: str,
) -> tuple[str, Tensor] | None:
    """Write the clips of one role, and return label and thumbnails of all on the first rank."""
    own = list(dict.fromkeys(rows.own))  # the last row may be there twice, to fill up a rank
    entry, began = record.begin(role), time.perf_counter()
    small = []
    for chunk in _chunks(own, request.batch):
        clips = model.sample(
            [request.prompts[row] for row in chunk],
            seed=request.seed,
            role=role,
            images=given[chunk].images,
            last_images=given[chunk].last_images,
            batch=len(chunk),
            first=chunk[0],
        )
        for row, clip in zip(chunk, clips, strict=True):
            stem = clip_stem(row, request.prompts[row], role)
            path = write_clip(clip, request.to, stem, format=request.format, fps=request.fps)
            _log.info("%s: %s", path.name, request.prompts[row])
        small.append(thumbnails(clips))
    entry["seconds_per_clip"] = (time.perf_counter() - began) / len(own)
    places = torch.tensor([own.index(row) for row in rows.own])
    gathered = rows.gather(torch.cat(small)[places])
    label = f"{role}\n{model.spec(role).calls_per_clip} calls"
    return None if gathered is None else (label, gathered)


def _stream(model: Model, request: Request, given: _Given) -> None:
    assert request.latent_frames is not None
    role, [prompt] = model.source.main, request.prompts
    record = SampleRecord(model, request)
    record.remove_former()
    seconds: list[float] = []
    with record.kept(here=True):
        record.begin(role)["seconds_per_chunk"] = seconds
        chunks = model.stream(
            prompt,
            frames=request.latent_frames,
            seed=request.seed,
            image=None if given.images is None else given.images[0],
        )
        path = _write_chunks(_timed(chunks, seconds), request, clip_stem(0, prompt, role))
    cli.say(f"{len(seconds)} chunks: {path}")


def _timed(chunks: Iterable[StreamedChunk], seconds: list[float]) -> Iterator[Tensor]:
    """Yield the frames [3, F, H_px, W_px] of each chunk, and note how long it took."""
    for number, chunk in enumerate(chunks, 1):
        seconds.append(chunk.seconds)
        count = chunk.frames.shape[2]
        _log.info(
            "chunk %d: %d frames in %.3g s (%.3g a second)",
            number, count, chunk.seconds, count / chunk.seconds,
        )  # fmt: skip
        yield chunk.frames[0]


def _write_chunks(frames: Iterator[Tensor], request: Request, stem: str) -> Path:
    """Write a video as it comes. After an interrupt it has what came before."""
    if request.format == "mp4":
        path = request.to / f"{stem}.mp4"
        write_stream(frames, path, fps=request.fps)
        return path
    parts: list[Tensor] = []
    interrupt = None
    try:
        parts.extend(frames)
    except KeyboardInterrupt as error:
        if not parts:
            raise
        interrupt = error
    clip = torch.cat(parts, dim=1)
    path = write_clip(clip, request.to, stem, format=request.format, fps=request.fps)
    if interrupt is not None:
        raise interrupt
    return path


def _chunks(rows: list[int], size: int) -> Iterator[list[int]]:
    yield from (rows[first : first + size] for first in range(0, len(rows), size))
