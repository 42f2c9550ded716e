"""A list of prompts, one a line: text without clips."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from distill_protocols import DataError
from distill_runtime import UnreadableFileError

from distill_media.items import MediaItem
from distill_media.sources.texts import MAX_TABLE, read_text


def items_of_prompts(file: Path) -> Iterator[MediaItem]:
    """Yield each line that is not empty, by its number.

    Raises:
        DataError: the file is missing, no text, or has no prompt.
    """
    try:
        text = read_text(file, max_bytes=MAX_TABLE)
    except UnreadableFileError as error:
        raise DataError(f"{error}. It should hold a prompt a line") from error
    found = False
    for number, line in enumerate(text.split("\n"), start=1):
        if prompt := line.strip():
            found = True
            yield MediaItem(id=f"{file.name}:{number}", captions=(prompt,))
    if not found:
        raise DataError(f"{file}: holds no prompt. Write one a line")
