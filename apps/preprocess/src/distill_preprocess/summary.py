"""What a finished data set is, in a few lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from distill_conditioning import Summary
from distill_media import MediaItem
from distill_runtime import counted, readable_bytes

_SHOWN = 5


def describe_summary(folder: str, summary: Summary, items: Sequence[MediaItem]) -> str:
    """Describe a data set: samples by shape, sizes, what was skipped, and what is odd."""
    index = summary.index
    size = sum(entry.bytes for entry in index.shards)
    skipped = [line for line in summary.report if line.skipped is not None]
    lines = [
        f"{index.samples:,} samples of {len(items):,} items in "
        f"{counted(len(index.shards), 'shard')}, {readable_bytes(size)} "
        f"({readable_bytes(index.bytes_per_sample)} a sample): {folder}"
    ]
    counts: Counter[str] = Counter()
    for entry in index.shards:
        counts[str(entry.shape)] += entry.samples
    if len(counts) > 1:
        lines += [f"  {count:,} x {shape}" for shape, count in counts.items()]
    if skipped:
        lines.append(f"  {len(skipped):,} skipped, each with its reason in report.jsonl:")
        lines += [f"    {line.id}: {line.skipped}" for line in skipped[:_SHOWN]]
        lines += ["    ..."] * (len(skipped) > _SHOWN)
    alike: dict[str, list[str]] = {}
    for note in (note for line in summary.report for note in line.notes):
        alike.setdefault(_kind_of(note), []).append(_without_number(note))
    for notes in sorted(alike.values(), key=len, reverse=True):
        more = " (and the like)" * (len(set(notes)) > 1)
        lines.append(f"  {counted(len(notes), 'clip')}: {notes[0]}{more}")
    if summary.same_embedding:
        captions = sum(map(len, summary.same_embedding))
        lines.append(
            f"  {captions:,} different captions share "
            f"{counted(len(summary.same_embedding), 'embedding')}: their ends are cut off, or "
            "their words unknown. For one:"
        )
        lines += [f"    {caption[:90]!r}" for caption in summary.same_embedding[0][:_SHOWN]]
    return "\n".join(lines)


def _kind_of(note: str) -> str:
    """Leave out the numbers of a note, so that alike ones are counted together."""
    return " ".join("" if w.strip("();,").isdigit() else w for w in _without_number(note).split())


def _without_number(note: str) -> str:
    """Leave out the number of the clip that a note is about."""
    return note.split(" ", 1)[1] if note.startswith("#") and " " in note else note
