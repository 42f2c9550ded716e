"""What would be made: the text of ``--dry-run``. No clip is cut out and nothing encoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod

from distill_media import ClipShape, MediaError, MediaItem, plan_clips
from distill_runtime import counted, readable_bytes

from distill_preprocess.request import (
    Request,
    buckets_of,
    cut_of,
    given_frames_of,
    items_of,
    scene_cuts_of,
)

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_SHOWN = 10
_LOOKED_INTO = 200
"""Videos and pictures whose packets are read, for their length and size."""


def describe(config: Request, limit: int | None) -> str:
    """Describe the request as text.

    Raises:
        DataError: a source cannot be read.
    """
    own = config.section
    items = items_of(config)[:limit]
    usable = [item for item in items if item.problem is None]
    lines = [
        f"data for {config.recipe.family}, by VAE and encoders of {config.source}",
        *_shapes(config),
        f"  {counted(len(items), 'item')}, {items[0].id} the first; "
        f"{len(items) - len(usable):,} cannot be used as they are listed",
        *_captions(config, usable),
        *_problems(items),
        *_clips(config, usable),
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
    if config.section.ode_pairs is not None:
        levels = ", ".join(f"{time:g}" for time in config.section.ode_pairs.times)
        return [f"  ODE pairs: states at t = {levels or 'none'}, and the clip"]
    cut = cut_of(config)
    shapes = ", ".join(map(str, buckets_of(config)))
    rate = "frames as they are" if cut.fps in ("keep", None) else f"{cut.fps:g} frames a second"
    return [f"  clips of {shapes} (frames x height x width), {rate}, {cut.take}{_given(config)}"]


def _given(config: Request) -> str:
    """Say which frames of the clips are stored for the condition."""
    given = given_frames_of(config)
    if not given:
        return ""
    first = "first frames" if given.first == 1 else f"{given.first} first frames"
    return f", with {first}{' and last ones' if given.last else ''}"


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


def _clips(config: Request, usable: Sequence[MediaItem]) -> list[str]:
    """Say which clips some of the items give, and which buckets stay empty."""
    own = config.section
    if not own.has_clips or not usable:
        return []
    buckets, cut, scene_cuts = buckets_of(config), cut_of(config), scene_cuts_of(config)
    chosen = usable[:: -(-len(usable) // _LOOKED_INTO)]

    def plan(item: MediaItem) -> list[ClipShape] | MediaError:
        try:
            return [clip.shape for clip in plan_clips(item, buckets, cut, scene_cuts=scene_cuts)]
        except MediaError as error:
            return error

    with ThreadPoolExecutor(own.decode_workers) as pool:
        results = list(pool.map(plan, chosen))
    bad = [result for result in results if isinstance(result, MediaError)]
    counts = Counter(
        shape for result in results if not isinstance(result, MediaError) for shape in result
    )
    found = ", ".join(f"{counts[shape]:,} of {shape}" for shape in buckets if counts[shape])
    which = "all" if len(chosen) == len(usable) else f"{len(chosen)} of them, evenly spread,"
    lines = [f"  {which} were looked into; clips: {found or 'none'}"]
    empty = [str(shape) for shape in buckets if not counts[shape]]
    if empty and counts:
        lines.append(
            f"  no clip falls into {', '.join(empty)}. Add clips that do, or leave it out of "
            "pipeline_config"
        )
    lines += [f"  {len(bad):,} of those would be skipped:"] * bool(bad)
    lines += [f"    {error}" for error in bad[:_SHOWN]]
    return lines


def _size(config: Request, count: int) -> list[str]:
    shape = config.family_plugin.latent_shape(config.pipeline, source=config.source)
    if config.section.captions_alone or shape is None:
        return []
    pairs = config.section.ode_pairs
    states = 1 if pairs is None else 1 + len(pairs.times)
    each = states * prod(shape) * _BYTES[config.section.latent_dtype]
    return [
        f"  up to {readable_bytes(each)} of latents a clip ({config.section.latent_dtype}); "
        f"{readable_bytes(count * each)} if each item gives one, and captions"
    ]
