"""Alarms on the disk: ``health.jsonl`` in the output folder, one line an alarm. No torch here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import attrs
from attrs import frozen
from distill_runtime import UnreadableFileError, naming_file, parse_json, replace_file

from distill_evaluation.health.rules import Finding

FILE = "health.jsonl"


@frozen(kw_only=True)
class Alarm:
    """One line of ``health.jsonl``.

    Attributes:
        iteration: after which it was raised.
        rule: its name under ``callbacks.health``.
        action: "warn", "keep" or "stop".
        message: for a person.
        value, threshold, reference: see ``Finding``.
        signal: name of the number.
        subject: whose it is, where a rule watches several.
    """

    iteration: int
    rule: str
    action: str
    message: str
    value: float
    threshold: float
    reference: float | None
    signal: str
    subject: str

    @classmethod
    def of(cls, finding: Finding, iteration: int) -> Alarm:
        """Make the alarm of a finding."""
        return cls(iteration=iteration, **attrs.asdict(finding))


class AlarmFile:
    """The alarms of a run.

    Args:
        output_dir: the run's.
    """

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / FILE

    def append(self, alarm: Alarm) -> None:
        """Add a line, which is on its way to the disk when this returns."""
        numbers = ("value", "threshold", "reference")
        entry = {
            # JSON has no nan and no inf; they are strings, as in metrics.jsonl.
            name: str(v) if name in numbers and v is not None and not math.isfinite(v) else v
            for name, v in attrs.asdict(alarm).items()
        }
        with naming_file(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")

    def resume(self, iteration: int) -> None:
        """Take back the alarms after ``iteration``, which this run raises again, and half a line
        that a killed process left."""
        if not self.path.exists():
            return
        with naming_file(self.path):
            lines = self.path.read_bytes().splitlines(keepends=True)
            rest = [line for line in lines if _stays(line, iteration)]
            if rest != lines:
                with replace_file(self.path) as part:
                    part.write_bytes(b"".join(rest))


def _stays(line: bytes, iteration: int) -> bool:
    try:
        entry = parse_json(line.decode(), "a line")
    except (UnreadableFileError, UnicodeDecodeError):
        return line.endswith(b"\n")  # it is not of this file, which is no reason to lose it
    number = entry.get("iteration") if isinstance(entry, dict) else None
    return line.endswith(b"\n") and (not isinstance(number, int) or number <= iteration)
