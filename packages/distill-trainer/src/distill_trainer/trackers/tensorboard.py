"""Numbers, texts and clips for TensorBoard."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from distill_media import clips_to_gif, side_by_side
from distill_runtime import naming_file, to_uint8
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import text as text_summary


class TensorBoardTracker:
    """Writes event files into ``folder``; a clip is an animated GIF among the images.

    Events are on their way to the disk when a call returns, and an error is the call's own:
    SummaryWriter has a thread, which prints a traceback when the disk is full.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file: BinaryIO | None = None
        self._next: int | None = None

    def resume(self, iteration: int) -> None:
        """Hide events after ``iteration`` of former processes, which may have come further."""
        self._next = iteration + 1

    def log_scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        summary = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(iteration, Summary(value=summary))

    def log_text(self, iteration: int, name: str, text: str) -> None:
        self._add(iteration, text_summary(name, text))

    def log_video(self, iteration: int, name: str, clips: Tensor, fps: float) -> None:
        # SummaryWriter.add_video wants moviepy for this; an image summary may hold any GIF.
        pixels = to_uint8(clips).numpy()
        _, height, width, _ = side_by_side(pixels[:, :1]).shape
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=clips_to_gif(pixels, fps)
        )
        self._add(iteration, Summary(value=[Summary.Value(tag=name, image=image)]))

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with naming_file(self.folder):
                file.close()

    def _add(self, iteration: int, summary: Summary) -> None:
        with naming_file(self.folder):
            if self._file is None:
                self._file = self._open()
            _write(self._file, Event(wall_time=time.time(), step=iteration, summary=summary))

    def _open(self) -> BinaryIO:
        # On first use: a run that logs nothing leaves no file.
        self.folder.mkdir(parents=True, exist_ok=True)
        # Files are read in the order of their names, and two processes may start in one second.
        name = f"{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        file = (self.folder / f"events.out.tfevents.{name}").open("xb")
        _write(file, Event(wall_time=time.time(), file_version="brain.Event:2"))
        if self._next is not None:
            start = SessionLog(status=SessionLog.START)
            _write(file, Event(wall_time=time.time(), step=self._next, session_log=start))
        return file


def _write(file: BinaryIO, event: Event) -> None:
    # At once, so that a process that is killed leaves at most one record unfinished.
    RecordWriter(file).write(event.SerializeToString())
    file.flush()
