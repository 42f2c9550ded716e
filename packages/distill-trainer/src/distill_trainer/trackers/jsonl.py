"""Numbers as lines of JSON."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor


class JsonlTracker:
    """Writes one JSON object per log point: ``iteration``, ``time`` (Unix seconds) and the numbers.

    Lines are complete as soon as they are logged. A resumed run appends; where an iteration
    occurs twice, the later line counts. inf and nan, which JSON lacks, are strings. Texts go in as
    lines of their own; clips are not written here.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def log_scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        self._write({"iteration": iteration, "time": time.time()} | _json_numbers(values))

    def log_text(self, iteration: int, name: str, text: str) -> None:
        self._write({"iteration": iteration, "time": time.time(), name: text})

    def log_video(self, iteration: int, name: str, clips: Tensor, fps: float) -> None: ...

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self._file is None:
            self._file = _open(self.path)
        self._file.write(json.dumps(entry, allow_nan=False) + "\n")


def _json_numbers(values: Mapping[str, float]) -> dict[str, float | str]:
    return {name: v if math.isfinite(v) else str(v) for name, v in values.items()}


def _open(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A run that was killed within a write leaves half a line; the next one must not join it.
    written = path.read_bytes() if path.exists() else b""
    file = path.open("a", buffering=1, encoding="utf-8")
    if written and not written.endswith(b"\n"):
        file.write("\n")
    return file
