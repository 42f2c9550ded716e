"""Output into pipes whose reader may go away: ``| head``, or a ``tee`` that Ctrl-C ends first."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


@contextlib.contextmanager
def outlive_readers() -> Iterator[None]:
    """Drop what is printed into a pipe that nobody reads any more, and go on without a word.

    Otherwise the next line of a run would raise in the middle of it, before its checkpoint is
    saved, and the interpreter would end with a message of its own and status 120.
    """
    former = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_outliving, former)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = former


def _outliving(stream: TextIO) -> TextIO:
    """Return a stream that outlives the reader of ``stream``; itself where it is no pipe."""
    if not isinstance(stream, io.TextIOWrapper) or stream.closed:
        return stream
    try:
        descriptor = stream.fileno()
    except OSError:  # a stand-in that has no file
        return stream
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(descriptor)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering or stream.write_through,
    )


class _Pipe(io.RawIOBase):
    """The writing end of a pipe. It is not closed with this object."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._is_read = True

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def write(self, data: ReadableBuffer, /) -> int:
        if self._is_read:
            try:
                return os.write(self._descriptor, data)
            except BrokenPipeError:
                self._is_read = False
        return memoryview(data).nbytes
