"""Texts as other programs write them: with a byte order mark, with CRLF, or in no UTF-8 at all."""

from __future__ import annotations

from pathlib import Path

from distill_runtime import UnreadableFileError, read_bytes

MAX_CAPTION = 1 << 20
"""Bytes of a caption's file; a long caption has a few thousand."""
MAX_TABLE = 1 << 31


def decode_text(content: bytes) -> str:
    """Return a text of UTF-8 (or UTF-16 with its mark), with line ends as ``\\n``.

    Raises:
        ValueError: it is none.
    """
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = content.decode(encoding)
    if "\0" in text:
        raise ValueError("it holds NUL characters, so it is no text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path, *, max_bytes: int) -> str:
    """Read a text file.

    Raises:
        UnreadableFileError: missing, too large, or no text.
    """
    content = read_bytes(path, max_bytes=max_bytes)
    try:
        return decode_text(content)
    except ValueError as error:
        raise UnreadableFileError(f"{path} is no UTF-8 text ({error}); save it as UTF-8") from error


def split_captions(text: str, *, lines: bool) -> tuple[str, ...]:
    """Return the captions of a file beside a clip, without those that are empty."""
    parts = text.split("\n") if lines else [" ".join(text.split("\n"))]
    return tuple(part.strip() for part in parts if part.strip())
