"""What would be made: the text of ``--dry-run``. No clip is decoded and nothing encoded."""

from __future__ import annotations

from collections import Counter
from math import prod

from distill_media import MediaItem, read_items
from distill_runtime import counted, readable_bytes

from distill_preprocess.request import Request, buckets_of, cut_of, needs_first_frames

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_SHOWN = 10


def describe(config: Request, limit: int | None) -> str:
    """Describe the request as text.

    Raises:
        DataError: a source cannot be read.
    """
    own = config.section
    items = read_items(own.sources, own.captions)[:limit]
    usable = [item for item in items if item.problem is None]
    lines = [
        f"data for {config.recipe.family}, by VAE and encoders of {config.source}",
        *_shapes(config),
        f"  {len(items):,} items, {len(items) - len(usable):,} of which cannot be used (what is "
        f"in them is read as they are made); the first: {items[0].id}",
        *_captions(config, usable),
        *_problems(items),
        *_size(config, len(usable)),
        f"  into {own.output_dir}, "
        f"{counted(-(-len(items) // own.items_per_unit), 'unit')} of "
        f"{own.items_per_unit} items",
    ]
    return "\n".join(lines)


def _shapes(config: Request) -> list[str]:
    if config.section.captions_alone:
        return ["  captions alone, without clips"]
    if config.section.encoded_already:
        return ["  latents and texts as they are stored"]
    cut = cut_of(config)
    shapes = ", ".join(map(str, buckets_of(config)))
    rate = "frames as they are" if cut.fps in ("keep", None) else f"{cut.fps:g} frames a second"
    first = ", with first frames" if needs_first_frames(config) else ""
    return [f"  clips of {shapes} (frames x height x width), {rate}, {cut.take}{first}"]


def _captions(config: Request, usable: list[MediaItem]) -> list[str]:
    captions = [caption for item in usable for caption in item.captions]
    distinct = list(dict.fromkeys(captions))
    lines = [f"  {len(captions):,} captions, {len(distinct):,} different ones"]
    from distill_preprocess.run import caption_notes

    notes = caption_notes(config, distinct)
    lines += [f"  {len(notes):,} captions are cut off or have unknown words:"] * bool(notes)
    lines += [
        f"    {text[:60]!r}: {'; '.join(said)}" for text, said in list(notes.items())[:_SHOWN]
    ]
    return lines


def _problems(items: list[MediaItem]) -> list[str]:
    bad = [item for item in items if item.problem is not None]
    if not bad:
        return []
    kinds = Counter(item.problem for item in bad)
    lines = [f"  {len(bad):,} would be skipped:"]
    lines += [f"    {item.id}: {item.problem}" for item in bad[:_SHOWN]]
    lines += [f"    ... {len(kinds)} reasons in all"] * (len(bad) > _SHOWN)
    return lines


def _size(config: Request, count: int) -> list[str]:
    shape = config.family_plugin.latent_shape(config.pipeline, source=config.source)
    if config.section.captions_alone or shape is None:
        return []
    each = prod(shape) * _BYTES[config.section.latent_dtype]
    return [
        f"  up to {readable_bytes(each)} of latents a clip ({config.section.latent_dtype}); "
        f"{readable_bytes(count * each)} if each item gives one, and captions"
    ]
