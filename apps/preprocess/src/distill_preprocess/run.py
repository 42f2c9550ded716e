"""From a checked request to a data set."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from attrs import define, evolve, field
from distill_conditioning import ItemKey, ReportLine, UnitFolder
from distill_media import MediaError, MediaItem, StoredReader, read_items, read_scene_cuts
from distill_protocols import Condition, DataError, DistillAdapter, ModelBundle
from distill_runfile import to_plain
from distill_runfile.progress import Progress
from distill_runtime import Worker, claim_folder, counted, sigterm_as_interrupt

from distill_preprocess.decoding import Decoded, decode_ahead
from distill_preprocess.encoding import Encoder, StoredShapes, UnitWriter
from distill_preprocess.request import (
    Request,
    buckets_of,
    cut_of,
    needs_first_frames,
    stored_text_of,
)
from distill_preprocess.summary import describe_summary

_log = logging.getLogger(__name__)

SHOWN = 20
"""Items that are skipped with a line on the terminal each."""


def run(
    config: Request, *, limit: int | None = None, add: bool = False, strict: bool = False
) -> bool:
    """Make what is missing of the data set; returns whether it is complete now.

    Args:
        limit: take the first items alone.
        add: items that the folder was not begun with are added.
        strict: the first item that cannot be used ends the run.

    Raises:
        DistillError: whatever is wrong with sources, encoders or folder.
    """
    own = config.section
    if own.cpu_threads is not None:
        torch.set_num_threads(own.cpu_threads)
    with (
        torch.no_grad(),
        sigterm_as_interrupt(),
    ):  # finished units stay: the next start goes on with them
        items = read_items(own.sources, own.captions)[:limit]
        worker = Worker.of_this_process()
        # By the number of the process: the others of its torchrun write there too.
        with claim_folder(Path(own.output_dir), f"worker-{worker.rank}"):
            return _make(config, items, worker, add=add, strict=strict)


def _make(
    config: Request, items: Sequence[MediaItem], worker: Worker, *, add: bool, strict: bool
) -> bool:
    own = config.section
    folder = UnitFolder(
        own.output_dir,
        settings=settings(config),
        items=[ItemKey(id=item.id, digest=item.digest) for item in items],
        items_per_unit=own.items_per_unit,
        add=add,
    )
    if folder.is_complete():
        _log.info("nothing to do: %s is whole", own.output_dir)
        return True
    device = worker.device(None if own.device == "auto" else own.device)
    missing = folder.missing(worker.rank, worker.size)
    _log.info("%s", _opening(config, folder, worker, missing, device))
    report = _Report(strict=strict, too_long=_caption_notes(config, items, folder, missing))
    adapter = make_adapter(config, device)
    with adapter.keep_encoders_loaded():
        encoder = Encoder(
            adapter=adapter,
            first_frames=needs_first_frames(config),
            several_sizes=len(config.family_plugin.clip_shapes(config.pipeline)) > 1,
            dtype=own.latent_dtype,
            cache=None if own.cache is None else Path(own.cache),
            fingerprint=adapter.condition_fingerprint(),
            stored=_stored_shapes(config),
        )
        reader = StoredReader()
        # Also by those that have no unit left: whoever is the last writes it.
        negative = _negative(config, adapter)
        count = sum(len(folder.items_of(unit)) for unit in missing)
        progress = Progress(count, "items", _log)
        with _results(config, items, folder, missing) as results:
            for unit in missing:
                writer = UnitWriter(
                    folder=folder,
                    unit=unit,
                    encoder=encoder,
                    batch_size=own.batch_size,
                    shard_bytes=own.shard_bytes,
                )
                chosen = [items[n] for n in folder.items_of(unit)]
                if own.encoded_already:
                    _take_unit(writer, chosen, reader, report)
                else:
                    _make_unit(writer, chosen, results, report)
                progress.advance(len(folder.items_of(unit)))
    summary = folder.finish(negative=negative, latent_dtype=own.latent_dtype)
    if summary is None:
        left = len(folder.missing())
        _log.info(
            "this process is done; %s with others",
            counted(left, "unit is still", "units are still"),
        )
        return False
    _log.info("%s", describe_summary(own.output_dir, summary, items))
    return True


def make_adapter(config: Request, device: torch.device) -> DistillAdapter:
    """Make the family's adapter without a role: VAE and encoders, and no transformer."""
    bundle = ModelBundle({}, device=device)
    return config.family_plugin.adapter(bundle, config.pipeline, source=config.source)


def settings(config: Request) -> dict[str, object]:
    """Collect all that decides a sample beside its item and the weights, which each unit's record
    names: what a folder must have been begun with to go on."""
    own = config.section
    return {
        "family": config.recipe.family,
        "shapes": [str(shape) for shape in buckets_of(config)],
        "negative_prompt": config.conditioning.negative_prompt,
        "clips": {
            **to_plain(evolve(cut_of(config), scene_cuts=None)),
            "cuts": scene_cuts_of(config),
        },
        "first_frames": needs_first_frames(config),
        "latent_dtype": own.latent_dtype,
        # The bits of a latent depend on how many are computed together.
        "batch_size": own.batch_size,
        "shard_bytes": own.shard_bytes,
    }


def scene_cuts_of(config: Request) -> Mapping[str, Sequence[float]]:
    """Read the list of scene cuts, where there is one."""
    file = config.section.clips.scene_cuts
    return {} if file is None else read_scene_cuts(Path(file))


@define(eq=False)
class _Report:
    """What there is to say of the items of a unit."""

    strict: bool
    too_long: Mapping[str, tuple[str, ...]]
    lines: dict[str, ReportLine] = field(factory=dict)
    skipped: int = 0

    def skip(self, error: MediaError) -> None:
        if self.strict:
            raise error
        self.skipped += 1
        if self.skipped <= SHOWN:
            _log.info("skipped %s", error)
        if self.skipped == SHOWN:
            _log.info("what else is skipped is in report.jsonl in the end")
        self.lines[error.item] = ReportLine(id=error.item, skipped=error.reason)

    def note(self, item: MediaItem, notes: Sequence[str]) -> None:
        known = self.lines.get(item.id, ReportLine(id=item.id))
        captions = [note for text in item.captions for note in self.too_long.get(text, ())]
        found = tuple(dict.fromkeys([*known.notes, *notes, *captions]))
        if found and known.skipped is None:
            self.lines[item.id] = evolve(known, notes=found)

    def take(self) -> list[ReportLine]:
        lines = list(self.lines.values())
        self.lines.clear()
        return lines


def _stored_shapes(config: Request) -> StoredShapes | None:
    """Return what samples that are encoded already must fit; None: they are encoded here."""
    text = stored_text_of(config)
    if not config.section.encoded_already or text is None:
        return None
    family, pipeline = config.family_plugin, config.pipeline
    sizes = [family.config_of_clip(pipeline, clip) for clip in family.clip_shapes(pipeline)]
    shapes = (family.latent_shape(size, source=config.source) for size in sizes)
    return StoredShapes(
        text=text[0],
        text_shape=text[1],
        latent_shapes=tuple(shape for shape in shapes if shape is not None),
    )


def _take_unit(
    writer: UnitWriter, items: Sequence[MediaItem], reader: StoredReader, report: _Report
) -> None:
    """Take samples that were encoded elsewhere."""
    for item in items:
        try:
            writer.add_stored(item, reader.read(item))
        except DataError as error:  # a value that is not finite, too
            reason = error.reason if isinstance(error, MediaError) else str(error)
            report.skip(MediaError(item.id, reason))
        else:
            report.note(item, ())
    writer.finish(report.take())


def _make_unit(
    writer: UnitWriter, items: Sequence[MediaItem], results: Iterator[Decoded], report: _Report
) -> None:
    if all(item.place is None and item.problem is None for item in items):
        for item in items:
            report.note(item, ())
        writer.add_prompts(items)
        writer.finish(report.take())
        return
    for item in items:
        for decoded in results:
            assert decoded.item is item
            if isinstance(decoded.result, MediaError):
                report.skip(decoded.result)
            else:
                # Of several clips of a video each note says which: "#3 does not move".
                which = decoded.result.id.removeprefix(item.id)
                report.note(item, [f"{which} {note}".lstrip() for note in decoded.notes])
                writer.add_clip(item, decoded.result)
            if decoded.last:
                break
    writer.finish(report.take())


@contextlib.contextmanager
def _results(
    config: Request, items: Sequence[MediaItem], folder: UnitFolder, missing: Sequence[int]
) -> Iterator[Iterator[Decoded]]:
    """Enter with what comes of all items of this process, decoded ahead over the ends of units."""
    own = config.section
    if own.captions_alone or own.encoded_already:
        yield iter(())
        return
    stream = decode_ahead(
        (items[number] for unit in missing for number in folder.items_of(unit)),
        buckets_of(config),
        cut_of(config),
        scene_cuts=scene_cuts_of(config),
        workers=own.decode_workers,
        ahead=own.decode_ahead,
    )
    with contextlib.closing(stream):
        yield stream


def _caption_notes(
    config: Request, items: Sequence[MediaItem], folder: UnitFolder, missing: Sequence[int]
) -> dict[str, tuple[str, ...]]:
    """By caption, what its tokenizer says against it."""
    mine = (items[number] for unit in missing for number in folder.items_of(unit))
    return caption_notes(config, list(dict.fromkeys(c for item in mine for c in item.captions)))


def caption_notes(config: Request, captions: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """By caption, that its end is not read or that words are unknown; nothing where neither is so,
    or where the family cannot tell."""
    tokens = config.family_plugin.count_tokens(config.pipeline, captions, source=config.source)
    if tokens is None:
        return {}
    notes = {}
    for caption, count, unknown in zip(captions, tokens.counts, tokens.unknown, strict=True):
        said = []
        if count > tokens.limit:
            said.append(f"its caption has {count} tokens, and the encoder reads {tokens.limit}")
        if unknown:
            said.append(
                f"its caption has {count} tokens, of which the tokenizer does not know {unknown}"
            )
        if said:
            notes[caption] = tuple(said)
    return notes


def _negative(config: Request, adapter: DistillAdapter) -> tuple[str, Condition] | None:
    """Prompt and condition that are stored beside the samples; None: none is asked for."""
    prompt = config.conditioning.negative_prompt
    if prompt is None:
        return None
    condition = adapter.encode_neg_condition(prompt).to("cpu")
    if len(condition) != 1:
        raise DataError(f"the negative prompt {prompt!r} gave {len(condition)} rows, and not one")
    return prompt, condition


def _opening(
    config: Request,
    folder: UnitFolder,
    worker: Worker,
    missing: Sequence[int],
    device: torch.device,
) -> str:
    own_units = len(range(worker.rank, folder.units, worker.size))
    who = f"process {worker.rank} of {worker.size}: " if worker.size > 1 else ""
    shapes = Counter(map(str, buckets_of(config)))
    what = "captions alone" if config.section.captions_alone else f"clips of {', '.join(shapes)}"
    if config.section.encoded_already:
        what = "latents and texts as they are stored"
    return (
        f"{what} for {config.recipe.family}, {config.source}, on {device}\n"
        f"{who}{own_units - len(missing)} of {counted(own_units, 'unit')} are there, "
        f"{len(missing)} to make, into {config.section.output_dir}"
    )
