"""Markdown as text: its code blocks, and links that lead elsewhere on the site."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from attrs import frozen

_FENCE = re.compile(r"^( *)(```+)([^\n`]*)\n(.*?)^\1\2 *$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(
    r"(`+)(?!`).+?(?<!`)\1(?!`)|(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", re.DOTALL
)
"""Code, or a link; whichever begins first."""
_REFERENCE = re.compile(r"^\[([^\]]+)\]: (\S+)$", re.MULTILINE)
_USE = re.compile(r"\[([^\[\]]+)\](?:\[([^\[\]]+)\])?(?![\[(:])")


@frozen(kw_only=True)
class CodeBlock:
    """A fenced block.

    Attributes:
        language: the first word behind the fence; empty where there is none.
        words: the others.
        text: what is in it.
        heading: of the section that it is in.
        line: of its fence, from 1.
    """

    language: str
    words: tuple[str, ...]
    text: str
    heading: str
    line: int


def code_blocks(text: str) -> Iterator[CodeBlock]:
    """Yield the fenced blocks of a page in their order."""
    for match in _FENCE.finditer(text):
        before = text[: match.start()]
        headings = re.findall(r"^#+ (.*)$", before, re.MULTILINE)
        language, *words = match[3].split() or [""]
        yield CodeBlock(
            language=language,
            words=tuple(words),
            text=match[4],
            heading=headings[-1] if headings else "",
            line=before.count("\n") + 1,
        )


def rewrite_links(text: str, target_of: Callable[[str], str | None]) -> str:
    """Give each link outside of code the target that ``target_of`` returns.

    None: what it leads to is not on the site, and only the words of the link stay.
    """
    dropped = {
        name
        for prose, _ in _split(text)
        for name, target in _REFERENCE.findall(prose)
        if target_of(target) is None
    }
    return "".join(_rewrite(prose, target_of, dropped) + code for prose, code in _split(text))


def _split(text: str) -> Iterator[tuple[str, str]]:
    """Yield prose and the fenced block that follows it."""
    position = 0
    for match in _FENCE.finditer(text):
        yield text[position : match.start()], match[0]
        position = match.end()
    yield text[position:], ""


def _rewrite(text: str, target_of: Callable[[str], str | None], dropped: set[str]) -> str:
    def inline(match: re.Match[str]) -> str:
        if match[1]:
            return match[0]
        target = target_of(match[4])
        return match[3] if target is None else f"{match[2]}[{match[3]}]({target})"

    def reference(match: re.Match[str]) -> str:
        target = target_of(match[2])
        return "" if target is None else f"[{match[1]}]: {target}"

    def use(match: re.Match[str]) -> str:
        return match[1] if (match[2] or match[1]) in dropped else match[0]

    text = _REFERENCE.sub(reference, _INLINE.sub(inline, text))
    return _USE.sub(use, text) if dropped else text
