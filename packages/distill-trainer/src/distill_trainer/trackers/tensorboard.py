"""Numbers, texts and clips for TensorBoard."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from distill_media import clips_to_gif, side_by_side
from distill_protocols import RunDescription
from distill_runtime import flatten, naming_file, to_uint8
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import custom_scalars, hparams
from torch.utils.tensorboard.summary import text as text_summary

MAIN = "0_main/"
"""Before the names of the main curves, which are there a second time: TensorBoard sorts groups by
their names, and would show ``grad_norm`` first."""
_MAIN = ("loss/", "report/", "validation/loss/")
_ALONE = "method/"
"""Before names without a group: TensorBoard would make a group of each."""
FINAL = "final/"
"""Before the names of final numbers."""
_LAYOUT = {
    "losses": {"training": r"^loss/(?!total_loss)", "held-out data": r"^validation/loss/",
               "total": r"^loss/total_loss"},
    "quality": {"Frechet distances": r"^report/.*/fd", "all measures": r"^report/"},
    "health": {"health": r"^health/"},
    "gradients": {"norms": r"^grad_norm/", "by loss": r"^loss_grad_norm/",
                  "learning rates": r"^lr/"},
    "speed": {"seconds an iteration": r"^time/(iteration|step|data)",
              "samples a second": r"^samples_per_second", "memory, GB": r"^memory/"},
}  # fmt: skip
_MOST_HPARAMS = 300


class TensorBoardTracker:
    """Writes event files into ``folder``; a clip is an animated GIF among the images.

    Main curves come first, as ``0_main/...``, and the tab *Custom Scalars* has charts of what
    belongs together. The run file is a text; the final numbers of a complete run are
    ``final/...``, and are in the tab *HParams* beside the settings that are numbers or words.

    Events are on their way to the disk when a call returns, and an error is the call's own:
    SummaryWriter has a thread, which prints a traceback when the disk is full.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file: BinaryIO | None = None
        self._next: int | None = None
        self._settings: Mapping[str, object] = {}

    def resume(self, iteration: int) -> None:
        """Hide events after ``iteration`` of former processes, which may have come further."""
        self._next = iteration + 1

    def describe(self, description: RunDescription) -> None:
        """Log the run file as a text, and keep the settings for the tab HParams."""
        self._settings = description.settings
        if description.run_file:
            # As Markdown: an indented block is shown as it is, whatever stands in it.
            code = "".join(f"    {line}\n" for line in description.run_file.splitlines())
            self.log_text((self._next or 1) - 1, "run_file", code)

    def log_scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        summary = [
            Summary.Value(tag=tag, simple_value=value)
            for name, value in values.items()
            for tag in _tags(name)
        ]
        self._add(iteration, Summary(value=summary))

    def log_summary(self, iteration: int, values: Mapping[str, float]) -> None:
        """Log final numbers, and the settings that they came of."""
        final = {f"{FINAL}{name}": value for name, value in values.items()}
        summary = [Summary.Value(tag=tag, simple_value=value) for tag, value in final.items()]
        self._add(iteration, Summary(value=summary))
        settings = {
            key: value
            for key, value in flatten(self._settings).items()
            if isinstance(value, str | bool | int | float)
        }
        finite = {tag: value for tag, value in final.items() if math.isfinite(value)}
        for part in hparams(dict(list(settings.items())[:_MOST_HPARAMS]), finite):
            self._add(iteration, part)

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
        _write(file, Event(wall_time=time.time(), summary=_layout()))
        return file


def _tags(name: str) -> Iterator[str]:
    """Yield the tags of a metric: its own name, within a group, and again among the main ones."""
    if name.startswith(_MAIN):
        yield f"{MAIN}{name}"
    yield name if "/" in name else f"{_ALONE}{name}"


def _layout() -> Summary:
    return custom_scalars(
        {
            title: {name: ["Multiline", [pattern]] for name, pattern in charts.items()}
            for title, charts in _LAYOUT.items()
        }
    )


def _write(file: BinaryIO, event: Event) -> None:
    # At once, so that a process that is killed leaves at most one record unfinished.
    RecordWriter(file).write(event.SerializeToString())
    file.flush()
