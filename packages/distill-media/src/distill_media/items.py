"""What every source gives: one item for each clip, picture or prompt. No heavy import here."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from attrs import frozen
from distill_runtime import open_file

VIDEO_SUFFIXES = (
    ".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".gif",
)  # fmt: skip
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MEDIA_SUFFIXES = (*VIDEO_SUFFIXES, *PICTURE_SUFFIXES)


@frozen
class MediaPlace:
    """Where the bytes of a clip or picture are: a file, or a part of one (a member of a tar).

    Attributes:
        name: as the source calls it; its suffix states whether it is a picture.
        size: in bytes; None: to the end of the file.
    """

    path: Path
    name: str
    offset: int = 0
    size: int | None = None

    @property
    def is_picture(self) -> bool:
        """Whether the name is that of a still picture."""
        return PurePosixPath(self.name).suffix.lower() in PICTURE_SUFFIXES

    def open(self) -> BinaryIO:
        """Open the bytes for reading and seeking.

        Raises:
            OSError: the file cannot be opened, or is no regular file.
        """
        file = open_file(self.path)
        if self.size is None:
            return file
        return io.BufferedReader(_Part(file, self.offset, self.size))


@frozen
class StoredRow:
    """A place in a file of samples that are encoded already."""

    path: Path
    group: int
    row: int


@frozen(kw_only=True)
class MediaItem:
    """One clip, picture or prompt of a source.

    Attributes:
        id: unique within all sources, and the same whenever they are read.
        captions: one or more; none: ``problem`` states why, or the item has none.
        place: None: a prompt alone, or a row of ``stored``.
        stored: where its latents are, if they are encoded already.
        segment: (start, end) in seconds, the part of the clip that the source speaks of.
        size: bytes of the clip, to notice another one in its place.
        problem: why the item cannot be used; None: nothing is known against it.
    """

    id: str
    captions: tuple[str, ...] = ()
    place: MediaPlace | None = None
    stored: StoredRow | None = None
    segment: tuple[float, float] | None = None
    size: int = 0
    problem: str | None = None

    @property
    def digest(self) -> str:
        """Hash of all that a sample is made from, as far as it is known without reading it."""
        # What was hashed before there were rows stays the same.
        row = () if self.stored is None else (self.stored.group, self.stored.row)
        parts = (self.id, self.captions, self.segment, self.size, self.problem, *row)
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


class _Part(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file = file
        self._start = start
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        count = max(0, min(len(view), self._size - self._position))
        self._file.seek(self._start + self._position)
        content = self._file.read(count)
        view[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()
