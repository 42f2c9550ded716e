"""A folder of clips and pictures, each with its caption in a text file beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from distill_protocols import DataError
from distill_runtime import UnreadableFileError

from distill_media.config import SourceConfig
from distill_media.items import MEDIA_SUFFIXES, MediaItem, MediaPlace
from distill_media.sources.texts import MAX_CAPTION, read_text, split_captions


def items_of_folder(folder: Path, source: SourceConfig) -> Iterator[MediaItem]:
    """Yield every clip and picture below ``folder``, by its relative path, sorted.

    Files that begin with a dot, and those in such folders, are left out. Links to folders are not
    followed: one could lead back.

    Raises:
        DataError: there is no such folder, or nothing to use in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. Name the one that clips and captions are in")
    names = sorted(_media_below(folder), key=lambda name: name.encode("utf-8", "surrogateescape"))
    if not names:
        raise DataError(
            f"{folder}: holds no clip or picture ({', '.join(MEDIA_SUFFIXES)}). Name the folder "
            "that they are in"
        )
    for name in names:
        yield _item(folder, name, source)


def _media_below(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in MEDIA_SUFFIXES:
                yield (Path(parent) / name).relative_to(folder).as_posix()


def _item(folder: Path, name: str, source: SourceConfig) -> MediaItem:
    path = folder / name
    shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    problem, captions, size = None, (), 0
    try:
        captions = _captions_beside(path, source)
        size = path.stat().st_size
    except UnreadableFileError as error:
        problem = f"its caption cannot be read: {error}"
    except OSError as error:
        problem = f"it cannot be read ({error.strerror or error})"
    place = MediaPlace(path, name)
    return MediaItem(id=shown, captions=captions, place=place, size=size, problem=problem)


def _captions_beside(path: Path, source: SourceConfig) -> tuple[str, ...]:
    file = path.with_suffix(source.caption_suffix)
    if not file.exists():
        file = path.with_name(path.name + source.caption_suffix)  # a.mp4.txt
    if not file.exists():
        return ()
    return split_captions(read_text(file, max_bytes=MAX_CAPTION), lines=source.caption_lines)
