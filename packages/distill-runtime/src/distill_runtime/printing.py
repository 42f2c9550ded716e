"""Text that came from files, made fit for a terminal. No torch here."""

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
