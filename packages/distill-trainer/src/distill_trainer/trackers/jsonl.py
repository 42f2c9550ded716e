"""Numbers as lines of JSON."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from distill_runtime import UnreadableFileError, naming_file, parse_json, replace_file
from torch import Tensor


class JsonlTracker:
    """Writes one JSON object per log point: ``iteration``, ``time`` (Unix seconds) and the numbers.

    Lines are complete as soon as they are logged. A resumed run takes back the lines of iterations
    that it makes again, and appends. inf and nan, which JSON lacks, are strings. Texts go in as
    lines of their own; clips are not written here.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def resume(self, iteration: int) -> None:
        """Drop lines of later iterations, and half a line that a killed process left."""
        if not self.path.exists():
            return
        with naming_file(self.path):
            with self.path.open("rb") as lines:
                stays = all(_stays(line, iteration) for line in lines)
            if stays:
                return
            with (
                self.path.open("rb") as lines,
                replace_file(self.path) as part,
                part.open("wb") as rest,
            ):
                rest.writelines(line for line in lines if _stays(line, iteration))

    def log_scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        self._write({"iteration": iteration, "time": time.time()} | _json_numbers(values))

    def log_text(self, iteration: int, name: str, text: str) -> None:
        self._write({"iteration": iteration, "time": time.time(), name: text})

    def log_video(self, iteration: int, name: str, clips: Tensor, fps: float) -> None: ...

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with naming_file(self.path):
                file.close()

    def _write(self, entry: Mapping[str, object]) -> None:
        with naming_file(self.path):
            if self._file is None:
                self._file = _open(self.path)
            self._file.write(json.dumps(entry, allow_nan=False) + "\n")


def _json_numbers(values: Mapping[str, float]) -> dict[str, float | str]:
    return {name: v if math.isfinite(v) else str(v) for name, v in values.items()}


def _stays(line: bytes, iteration: int) -> bool:
    """Return whether ``line`` is whole, and not of an iteration after ``iteration``."""
    if not line.endswith(b"\n"):
        return False
    try:
        entry = parse_json(line.decode(), "a line")
    except (UnreadableFileError, UnicodeDecodeError):
        return True  # it is not of this tracker, which is no reason to lose it
    number = entry.get("iteration") if isinstance(entry, dict) else None
    return not isinstance(number, int) or number <= iteration


def _open(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A run that was killed within a write leaves half a line; the next one must not join it.
    written = path.read_bytes() if path.exists() else b""
    file = path.open("a", buffering=1, encoding="utf-8")
    if written and not written.endswith(b"\n"):
        file.write("\n")
    return file
