"""From a checked request to files."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from distill_runfile import cli, to_plain
from distill_runtime import RowPartition, counted, device_type, json_text, replace_file
from distill_trainer import Distribution
from distill_trainer.config import DistributedConfig
from torch import Tensor

from distill_sample.files import (
    clip_stem,
    read_first_frames,
    thumbnails,
    write_clip,
    write_sheets,
    write_stream,
)
from distill_sample.model import Model, load
from distill_sample.request import Request
from distill_sample.sources import RECORD_FILE, SampleSource

_log = logging.getLogger(__name__)


def run(source: SampleSource, request: Request) -> None:
    """Load the models and write what was asked for; on every rank that torchrun started.

    Raises:
        DistillError: weights, pictures or prompts cannot be used.
        OSError: a file cannot be written.
    """
    with Distribution.start(DistributedConfig(), device_type()) as distribution:
        ranks = distribution.ranks
        request.to.mkdir(parents=True, exist_ok=True)
        model = load(
            source,
            device=distribution.device,
            cache=request.to,
            negative_prompt=request.negative_prompt,
            ranks=ranks,
        )
        _log.info("%s of %s on %s", ", ".join(source.roles), source.name, distribution.device)
        images = _read_images(model, request)
        with model.adapter.keep_encoders_loaded():
            model.prepare(request.prompts)
        if request.latent_frames is not None:
            _stream(model, request, images)
        else:
            _sample(model, request, images, RowPartition(ranks, len(request.prompts)))


def _read_images(model: Model, request: Request) -> Tensor | None:
    if not request.images:
        return None
    images = read_first_frames(request.images, model.clip_size())
    return images if len(images) > 1 else images.expand(len(request.prompts), -1, -1, -1)


def _sample(model: Model, request: Request, images: Tensor | None, rows: RowPartition) -> None:
    """Make the clips of this rank's prompts; the first rank draws the sheets of all."""
    own = list(dict.fromkeys(rows.own))  # the last row may be there twice, to fill up a rank
    sheet: list[tuple[str, Tensor]] = []
    records: list[dict[str, object]] = []
    for role in model.source.roles:
        began = time.perf_counter()
        small = []
        for chunk in _chunks(own, request.batch):
            clips = model.sample(
                [request.prompts[row] for row in chunk],
                seed=request.seed,
                role=role,
                images=None if images is None else images[chunk],
                batch=len(chunk),
                first=chunk[0],
            )
            for row, clip in zip(chunk, clips, strict=True):
                stem = clip_stem(row, request.prompts[row], role)
                path = write_clip(clip, request.to, stem, format=request.format, fps=request.fps)
                _log.info("%s: %s", path.name, request.prompts[row])
            small.append(thumbnails(clips))
        seconds = (time.perf_counter() - began) / len(own)
        places = torch.tensor([own.index(row) for row in rows.own])
        gathered = rows.gather(torch.cat(small)[places])
        records.append({"role": role, **_record(model, role), "seconds_per_clip": seconds})
        if gathered is not None:
            calls = model.spec(role).calls_per_clip
            sheet.append((f"{role}\n{calls} calls", gathered))
    if rows.ranks.is_first:
        for path in write_sheets(sheet, request.prompts, request.to, fps=request.fps):
            _log.info("%s", path.name)
        _write_record(model, request, records)
        cli.say(f"{counted(len(request.prompts) * len(records), 'clip')} in {request.to}")


def _stream(model: Model, request: Request, images: Tensor | None) -> None:
    assert request.latent_frames is not None
    role, [prompt] = model.source.main, request.prompts
    chunks = model.stream(
        prompt,
        frames=request.latent_frames,
        seed=request.seed,
        image=None if images is None else images[0],
    )
    seconds: list[float] = []

    def frames() -> Iterator[Tensor]:
        for number, chunk in enumerate(chunks, 1):
            seconds.append(chunk.seconds)
            count = chunk.frames.shape[2]
            _log.info(
                "chunk %d: %d frames in %.3g s (%.3g a second)",
                number, count, chunk.seconds, count / chunk.seconds,
            )  # fmt: skip
            yield chunk.frames[0]

    stem = clip_stem(0, prompt, role)
    if request.format == "mp4":
        path = request.to / f"{stem}.mp4"
        write_stream(frames(), path, fps=request.fps)
    else:
        clip = torch.cat(list(frames()), dim=1)
        path = write_clip(clip, request.to, stem, format=request.format, fps=request.fps)
    record = {"role": role, **_record(model, role), "seconds_per_chunk": seconds}
    _write_record(model, request, [record])
    cli.say(f"{len(seconds)} chunks: {path}")


def _chunks(rows: list[int], size: int) -> Iterator[list[int]]:
    yield from (rows[first : first + size] for first in range(0, len(rows), size))


def _record(model: Model, role: str) -> dict[str, object]:
    own = model.source.roles[role]
    weights = "live" if own.weights else "of its path"
    return {
        "weights": "ema" if own.ema else weights,
        "sampler": to_plain(model.spec(role)),
    }


def _write_record(model: Model, request: Request, roles: list[dict[str, object]]) -> None:
    """Leave what the clips were made of beside them."""
    prompts = [
        {"prompt": prompt, "seed": request.seed + number}
        for number, prompt in enumerate(request.prompts)
    ]
    record = {"source": model.source.name, "roles": roles, "clips": prompts}
    with replace_file(request.to / RECORD_FILE) as part:
        Path(part).write_text(json_text(record))
