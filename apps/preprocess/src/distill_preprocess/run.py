"""From a checked request to a data set."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from attrs import define, evolve, field
from distill_conditioning import ItemKey, ReportLine, UnitFolder
from distill_media import MediaError, MediaItem, StoredReader
from distill_protocols import Condition, DataError, DistillAdapter, ModelBundle
from distill_runfile import to_plain
from distill_runfile.progress import Progress
from distill_runtime import Worker, claim_folder, counted, sigterm_as_interrupt

from distill_preprocess.captions import CaptionFiles
from distill_preprocess.decoding import Decoded, decode_ahead
from distill_preprocess.encoding import Encoder, PairShapes, StoredShapes, UnitWriter
from distill_preprocess.pairs import PairFile, open_pairs
from distill_preprocess.request import (
    Request,
    buckets_of,
    cut_of,
    given_frames_of,
    items_of,
    scene_cuts_of,
    stored_conditions_of,
    stored_shapes_of,
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
        items = items_of(config)[:limit]
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
    with contextlib.ExitStack() as loaded:
        loaded.enter_context(adapter.keep_encoders_loaded())
        encoder = Encoder(
            adapter=adapter,
            device=device,
            given=given_frames_of(config),
            dtype=own.latent_dtype,
            cache=None if own.cache is None else Path(own.cache),
            fingerprint=adapter.condition_fingerprint(),
            stored=_stored_shapes(config),
            pairs=_pair_shapes(config),
        )
        # Also by those that have no unit left: whoever is the last writes it.
        negative = _negative(config, adapter)
        more_negatives = {
            prompt: _encode_negative(prompt, adapter)
            for prompt in config.conditioning.more_negative_prompts
        }
        files = CaptionFiles(folder, items, encoder)
        if own.has_clips:
            files.encode(missing, own.batch_size)
            # Frees the text encoder before the VAE is there; the next ones are encoders of images.
            loaded.close()
            loaded.enter_context(adapter.keep_encoders_loaded())
        _make_units(config, items, folder, missing, files, report)
    if not folder.missing():
        files.remove_all()
    summary = folder.finish(
        negative=negative,
        latent_dtype=own.latent_dtype,
        trajectory_times=() if own.ode_pairs is None else own.ode_pairs.times,
        more_negatives=more_negatives,
    )
    if summary is None:
        left = len(folder.missing())
        _log.info(
            "this process is done; %s with others",
            counted(left, "unit is still", "units are still"),
        )
        return False
    _log.info("%s", describe_summary(own.output_dir, summary, items))
    return True


def _make_units(
    config: Request,
    items: Sequence[MediaItem],
    folder: UnitFolder,
    units: Sequence[int],
    files: CaptionFiles,
    report: _Report,
) -> None:
    own, encoder = config.section, files.encoder
    reader = StoredReader(tuple(encoder.stored.names) if encoder.stored is not None else ())
    pairs = None if own.ode_pairs is None else open_pairs(own.ode_pairs)
    progress = Progress(sum(len(folder.items_of(unit)) for unit in units), "items", _log)
    with _results(config, items, folder, units) as results:
        for unit in units:
            writer = UnitWriter(
                folder=folder,
                unit=unit,
                encoder=encoder,
                batch_size=own.batch_size,
                shard_bytes=own.shard_bytes,
            )
            chosen = [items[n] for n in folder.items_of(unit)]
            if pairs is not None:
                _take_pairs(writer, chosen, pairs, report)
            elif own.encoded_already:
                _take_unit(writer, chosen, reader, report)
            else:
                if files.path(unit).exists():
                    writer.captions.load(files.path(unit))
                _make_unit(writer, chosen, results, report)
                files.path(unit).unlink(missing_ok=True)
            progress.advance(len(chosen))


def make_adapter(config: Request, device: torch.device) -> DistillAdapter:
    """Make the family's adapter without a role: VAE and encoders, and no transformer."""
    bundle = ModelBundle({}, device=device)
    return config.family_plugin.adapter(bundle, config.pipeline, source=config.source)


def settings(config: Request) -> dict[str, object]:
    """Collect all that decides a sample beside its item and the weights, which each unit's record
    names: what a folder must have been begun with to go on."""
    own, given = config.section, given_frames_of(config)
    more = config.conditioning.more_negative_prompts
    clips = {**to_plain(evolve(cut_of(config), scene_cuts=None)), "cuts": scene_cuts_of(config)}
    if not own.clips.crop_bars:  # so that folders of earlier releases go on
        del clips["crop_bars"]
    return {
        "family": config.recipe.family,
        "shapes": [str(shape) for shape in buckets_of(config)],
        "negative_prompt": config.conditioning.negative_prompt,
        **({"more_negative_prompts": list(more)} if more else {}),
        "clips": clips,
        # As releases that knew one first frame alone wrote it, where there are no others.
        "first_frames": bool(given.first) if given.first < 2 else given.first,
        **({"last_frame": True} if given.last else {}),
        "latent_dtype": own.latent_dtype,
        # The bits of a latent depend on how many are computed together.
        "batch_size": own.batch_size,
        "shard_bytes": own.shard_bytes,
        # Left out where there are none, so that folders of earlier releases go on.
        **({} if own.ode_pairs is None else {"trajectory_times": list(own.ode_pairs.times)}),
    }


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

    def skip_for(self, item: MediaItem, error: DataError) -> None:
        self.skip(error if isinstance(error, MediaError) else MediaError(item.id, str(error)))

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
    names = stored_conditions_of(config)
    if not config.section.encoded_already or names is None:
        return None
    return StoredShapes(names=names, shapes=stored_shapes_of(config))


def _pair_shapes(config: Request) -> PairShapes | None:
    """Return what ODE pairs must fit; None: there are none."""
    pairs = config.section.ode_pairs
    if pairs is None:
        return None
    latents = (shape.latents for shape in stored_shapes_of(config))
    return PairShapes(
        states=len(pairs.times) + 1,
        latents=tuple(shape for shape in latents if shape is not None),
    )


def _take_pairs(
    writer: UnitWriter, items: Sequence[MediaItem], pairs: PairFile, report: _Report
) -> None:
    """Take ODE pairs: their states as they are, their captions through the text encoder."""
    writer.encode_captions(items)
    _take_each(writer, items, lambda item: writer.add_pair(item, pairs.read(item)), report)


def _take_unit(
    writer: UnitWriter, items: Sequence[MediaItem], reader: StoredReader, report: _Report
) -> None:
    """Take samples that were encoded elsewhere."""
    _take_each(writer, items, lambda item: writer.add_stored(item, reader.read(item)), report)


def _take_each(
    writer: UnitWriter,
    items: Sequence[MediaItem],
    take: Callable[[MediaItem], None],
    report: _Report,
) -> None:
    """Take what needs no decoding item by item, and finish the unit."""
    for item in items:
        try:
            take(item)
        except DataError as error:  # a value that is not finite, too
            report.skip_for(item, error)
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
    if not own.has_clips:
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
    return prompt, _encode_negative(prompt, adapter)


def _encode_negative(prompt: str, adapter: DistillAdapter) -> Condition:
    condition = adapter.encode_neg_condition(prompt).to("cpu")
    if len(condition) != 1:
        raise DataError(f"the negative prompt {prompt!r} gave {len(condition)} rows, and not one")
    return condition


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
    if config.section.ode_pairs is not None:
        what = f"ODE pairs with {counted(len(config.section.ode_pairs.times), 'level')}"
    return (
        f"{what} for {config.recipe.family}, {config.source}, on {device}\n"
        f"{who}{own_units - len(missing)} of {counted(own_units, 'unit')} are there, "
        f"{len(missing)} to make, into {config.section.output_dir}"
    )
