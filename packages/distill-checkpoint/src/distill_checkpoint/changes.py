"""What differs between the run file of a checkpoint and the one that goes on from it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen
from distill_protocols import CheckpointError

from distill_checkpoint.fitting import changes_yaml

# A role's own section holds training.optimizer too: it is what its optimizer was made from.
_OPTIMIZER = re.compile(r"models\.(?P<role>.+?)\.optimizer\..+")
_SCHEDULE = re.compile(r"(training|models\.[^.]+)\.optimizer\.schedule\.name")
# Say where and how to resume: they nearly always differ, and are over once that is done.
_NOT_COMPARED = ("checkpoint.resume", "checkpoint.changes")
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
        if not key.startswith(_NOT_COMPARED) and before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]


def optimizer_changes(found: Iterable[Change]) -> dict[str, list[Change]]:
    """Of ``found``, changed settings of optimizers, by role.

    A key that only one of the two has is no changed setting: which optimizers there are is
    compared by itself, when their state is put back.
    """
    by_role: dict[str, list[Change]] = {}
    for change in found:
        match = _OPTIMIZER.fullmatch(change.key)
        if match and _ABSENT not in (change.then, change.now):
            by_role.setdefault(match["role"], []).append(change)
    return by_role


def refuse_changed_optimizers(source: Path, by_role: Mapping[str, list[Change]]) -> None:
    """Refuse other settings of optimizers that do not start anew.

    Raises:
        CheckpointError: there are some: their state carries the old values.
    """
    if not by_role:
        return
    entries = [f"optimizers.{role}" for role in by_role]
    told = "; ".join(str(change) for changes in by_role.values() for change in changes)
    raise CheckpointError(
        f"{source} cannot be resumed with other optimizer settings: {told}. The optimizer's state "
        "in the checkpoint carries the old values, so the new ones would be dropped without a "
        "sign. Put the old ones back, or start with the new ones in a new output_dir "
        "(checkpoint.resume: none), or let just the optimizer start anew here, without its moments "
        f"and update count:\n{changes_yaml(added=entries, dropped=entries)}"
    )


def refuse_changed_scales(
    source: Path, then: Mapping[str, Any], now: Mapping[str, Any], loaded: Iterable[str]
) -> None:
    """Refuse adapters that would count more or less than they did: no shape shows it.

    Args:
        loaded: roles whose weights are taken from the checkpoint.

    Raises:
        CheckpointError: alpha / rank of a role's lora differs.
    """
    for role in sorted(set(loaded)):
        before, after = _lora_scale(then, role), _lora_scale(now, role)
        if before is not None and after is not None and before != after:
            entries = [f"roles.{role}"]
            raise CheckpointError(
                f"{source} cannot be resumed with another scale of adapters: alpha / rank of "
                f"models.{role}.lora is {before:g} in the checkpoint and {after:g} now. The same "
                "numbers would be other weights from one step to the next. Put the old alpha back, "
                "or start in a new output_dir (checkpoint.resume: none), or let the role start "
                f"anew here:\n{changes_yaml(added=entries, dropped=entries)}"
            )


def _lora_scale(config: Mapping[str, Any], role: str) -> float | None:
    lora = ((config.get("models") or {}).get(role) or {}).get("lora")
    if not lora:
        return None
    alpha = lora.get("alpha")
    return 1.0 if alpha is None else alpha / lora["rank"]


def change_notes(found: Iterable[Change], now: Mapping[str, Any]) -> list[str]:
    """One line a changed key."""
    schedules = _moving_schedules(now)
    notes = []
    for change in found:
        note = ""
        if change.key == "training.max_train_steps" and schedules:
            note = (
                f"; the {' and '.join(schedules)} schedule now ends at the new end, so the "
                "learning rate jumps here"
            )
        notes.append(f"{change}{note}")
    return notes


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
