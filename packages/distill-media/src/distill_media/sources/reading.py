"""All sources of a data set as one list of items, in an order that does not change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from attrs import evolve
from distill_protocols import DataError

from distill_media.config import CaptionsConfig, SourceConfig
from distill_media.items import MediaItem
from distill_media.sources.folders import items_of_folder
from distill_media.sources.prompts import items_of_prompts
from distill_media.sources.tables import items_of_table
from distill_media.sources.tars import items_of_tars

_SHOWN = 10


def read_items(sources: Sequence[SourceConfig], captions: CaptionsConfig) -> list[MediaItem]:
    """List the items of all sources: sources in their order, each sorted by its own.

    No clip is opened. What is known against an item already is its ``problem``.

    Raises:
        DataError: a source is missing or unreadable as a whole, two sources have items of one
            name, or ``captions.missing`` is ``error`` and there are such.
    """
    items = [
        _with_captions(item, captions) for source in sources for item in _items_of_source(source)
    ]
    counts = Counter(item.id for item in items)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise DataError(
            f"{len(twice)} items have the id of another ({twice[0]!r}, for one), and an id "
            "names one sample. Give each source a name of its own"
        )
    if captions.missing == "error" and (bare := [i.id for i in items if _lacks_caption(i)]):
        shown = ", ".join(map(repr, bare[:_SHOWN])) + (" ..." if len(bare) > _SHOWN else "")
        raise DataError(
            f"{len(bare)} of {len(items)} clips have no caption: {shown}. Write them, or choose "
            "what becomes of such clips (missing: skip or empty)"
        )
    return items


def _items_of_source(source: SourceConfig) -> Iterator[MediaItem]:
    prefix = f"{source.name}/" if source.name is not None else ""
    for item in _unique(_read(source)):
        yield evolve(item, id=prefix + item.id) if prefix else item


def _read(source: SourceConfig) -> Iterable[MediaItem]:
    if source.folder is not None:
        return items_of_folder(Path(source.folder), source)
    if source.table is not None:
        return items_of_table(Path(source.table), source)
    if source.tars is not None:
        return items_of_tars(Path(source.tars), source)
    if source.latents is not None:
        from distill_media.stored import items_of_stored  # numpy

        return items_of_stored(Path(source.latents))
    assert source.prompts is not None
    return items_of_prompts(Path(source.prompts))


def _unique(items: Iterable[MediaItem]) -> Iterator[MediaItem]:
    """Number what a source names several times: ``a.mp4``, ``a.mp4@2``."""
    seen: Counter[str] = Counter()
    for item in items:
        seen[item.id] += 1
        count = seen[item.id]
        yield item if count == 1 else evolve(item, id=f"{item.id}@{count}")


def _lacks_caption(item: MediaItem) -> bool:
    return not item.captions and item.problem is None


def _with_captions(item: MediaItem, config: CaptionsConfig) -> MediaItem:
    if _lacks_caption(item) and config.missing == "skip":
        return evolve(item, problem="it has no caption. Write one, or set missing: empty")
    if _lacks_caption(item) and config.missing == "empty":
        item = evolve(item, captions=("",))
    return evolve(item, captions=tuple(config.prefix + caption for caption in item.captions))
