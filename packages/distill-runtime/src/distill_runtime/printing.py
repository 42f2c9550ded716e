"""Text for a terminal: what came from files, made fit for it; numbers as people read them. No torch
here."""

from __future__ import annotations

import re

_UNFIT = re.compile(
    "[^\n\t -~\xa0-\U0010ffff]"  # control characters: a terminal obeys them
    "|[\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"  # unseen ones
    "|[\ud800-\udfff]"  # halves of UTF-16 pairs, which no terminal can be sent
)


def printable(text: str, *, one_line: bool = False) -> str:
    """``text`` with everything escaped that a terminal would obey, reorder or hide.

    Prompts, captions and names of any language stay as they are.

    Args:
        one_line: escape line breaks and tabs too, for a name within a line: it shall not pass for
            lines of our own.
    """
    if one_line:
        text = text.replace("\n", "\\n").replace("\t", "\\t")
    return _UNFIT.sub(lambda match: ascii(match[0])[1:-1], text)


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """``1 shard``, ``1,200 shards``.

    Args:
        noun: in the singular.
        plural: where it is not ``noun`` with an s.
    """
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def readable_bytes(count: float) -> str:
    """Write a size as ``4.3 GB`` (powers of ten)."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    digits = 0 if size >= 100 or units[0] == "B" else 1
    return f"{size:.{digits}f} {units[0]}"
