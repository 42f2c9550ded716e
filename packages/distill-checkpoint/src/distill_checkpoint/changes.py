"""What differs between the run file of a checkpoint and the one that goes on from it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen
from distill_protocols import CheckpointError

logger = logging.getLogger(__name__)

# A role's own section holds training.optimizer too: it is what its optimizer was made from.
_OPTIMIZER = re.compile(r"models\.[^.]+\.optimizer\..+")
_SCHEDULE = re.compile(r"(training|models\.[^.]+)\.optimizer\.schedule\.name")
# Says where to resume from: it nearly always differs, and is over once that is done.
_NOT_COMPARED = frozenset({"checkpoint.resume"})
_ABSENT = object()


@frozen
class Change:
    """One key that is not as it was."""

    key: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} is {_shown(self.then)} in the checkpoint and {_shown(self.now)} now"


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Keys, joined by dots, whose values differ; lists are compared as a whole."""
    before, after = dict(_leaves(then)), dict(_leaves(now))
    return [
        Change(key, before.get(key, _ABSENT), after.get(key, _ABSENT))
        for key in sorted(before.keys() | after.keys())
        if key not in _NOT_COMPARED and before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]


def check_changes(source: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Log one warning a changed key; refuse changed settings of an optimizer.

    A key that only one of the two has is no changed setting: which optimizers there are is
    compared by itself, when their state is put back.

    Raises:
        CheckpointError: settings of an optimizer differ, whose state carries the old values.
    """
    found = changes(then, now)
    refused = [
        change
        for change in found
        if _OPTIMIZER.fullmatch(change.key) and _ABSENT not in (change.then, change.now)
    ]
    if refused:
        raise CheckpointError(
            f"{source} cannot be resumed with other optimizer settings: "
            f"{'; '.join(map(str, refused))}. The optimizer's state in the checkpoint carries the "
            "old values, so the new ones would be dropped without a sign. Put the old ones back, "
            "or start with the new ones in a new output_dir (checkpoint.resume: none)."
        )
    schedules = _moving_schedules(now)
    for change in found:
        note = ""
        if change.key == "training.max_train_steps" and schedules:
            note = (
                f"; the {' and '.join(schedules)} schedule now ends at the new end, so the "
                "learning rate jumps here"
            )
        logger.warning("resuming %s: %s%s", source.name, change, note)


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _moving_schedules(config: Mapping[str, Any]) -> list[str]:
    return sorted(
        {
            str(value)
            for key, value in _leaves(config)
            if _SCHEDULE.fullmatch(key) and value != "constant"
        }
    )


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else repr(value)
