"""A run file as HTML: comments, keys, text and numbers stand out."""

from __future__ import annotations

import re
from html import escape

_TOKENS = re.compile(
    r"""(?P<comment>(?<!\S)\#.*$)
    |(?P<key>(?<![\w.\-/])[\w.\-/]+(?=\s*:(?:\s|$)))
    |(?P<text>"(?:[^"\\]|\\.)*"|'[^']*')
    |(?P<number>(?<![\w.\-/])[-+]?\d[\d_]*(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.\-/]))
    |(?P<word>(?<![\w.\-/])(?:true|false|null|~)(?![\w.\-/]))""",
    re.VERBOSE,
)
MOST_CHARACTERS = 200_000
_LONGEST_LINE = 1_000
"""What is longer is shown plain: quotes that nothing ends take time in the square of a line."""


def highlight(text: str) -> str:
    """Return YAML or JSON as escaped HTML with ``<span class=...>``; what is longer than
    ``MOST_CHARACTERS`` is cut off, and the last line says so."""
    cut = "\n# ... (cut off here)" if len(text) > MOST_CHARACTERS else ""
    return "\n".join(map(_highlight_line, (text[:MOST_CHARACTERS] + cut).splitlines()))


def _highlight_line(line: str) -> str:
    if len(line) > _LONGEST_LINE:
        return escape(line)
    parts, end = [], 0
    for match in _TOKENS.finditer(line):
        parts.append(escape(line[end : match.start()]))
        parts.append(f'<span class="{match.lastgroup}">{escape(match[0])}</span>')
        end = match.end()
    return "".join([*parts, escape(line[end:])])
