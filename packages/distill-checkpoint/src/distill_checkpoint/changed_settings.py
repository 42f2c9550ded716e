"""What differs between the run file in a checkpoint and the run's, and what that means. No torch.

Settings of an optimizer are the run file's also in the middle of a run: another learning rate,
schedule, weight decay or eps holds from the resume on, and moments and the count of steps stay.
Another kind of optimizer, or other decays of the moments (betas), need a rule, because its state
was made under the old ones: Adam divides its moments by 1 - beta^steps of all steps before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen
from distill_protocols import CheckpointError, Problem
from distill_runtime import UnreadableFileError, read_json

from distill_checkpoint.config import CheckpointConfig
from distill_checkpoint.manifest import Contents, inspect, json_of, rank_key, read_config
from distill_checkpoint.output_folder import list_checkpoints

DATA = "data"
"""The entry of a ``ChangesConfig`` for the data position: in both lists, another data set is read
from its first sample."""

_PLAIN = re.compile(r"[A-Za-z0-9_./-]+")


def changes_section(*, added: Iterable[str] = (), dropped: Iterable[str] = ()) -> str:
    """Return the ``ChangesConfig`` of these entries as YAML."""
    lines = ["changes:"]
    for name, entries in (("added", sorted(added)), ("dropped", sorted(dropped))):
        if entries:
            # JSON's strings are YAML's.
            scalars = [entry if _PLAIN.fullmatch(entry) else json.dumps(entry) for entry in entries]
            lines.append(f"  {name}: [{', '.join(scalars)}]")
    return "\n".join(lines)


# A role's own section holds training.optimizer too: it is what its optimizer was made from.
_OPTIMIZER = re.compile(r"models\.(?P<role>.+?)\.optimizer\..+")
_SCHEDULE = re.compile(r"(training|models\.[^.]+)\.optimizer\.schedule\.name")
# These state where and how to resume: they nearly always differ, and are over once that is done.
_NOT_COMPARED = ("checkpoint.resume", "checkpoint.changes")
_ABSENT, _PRESENT = object(), object()
_WORDS = {_ABSENT: "absent", _PRESENT: "there"}


@frozen
class ChangedKey:
    """One key of the run file that is not as it was."""

    key: str
    then: object
    now: object

    def __str__(self) -> str:
        then, now = (
            _WORDS[v] if v in (_ABSENT, _PRESENT) else repr(v) for v in (self.then, self.now)
        )
        return f"{self.key} is {then} in the checkpoint and {now} now"


def changed_keys(then: Mapping[str, object], now: Mapping[str, object]) -> list[ChangedKey]:
    """Return keys, joined by dots, whose values differ; lists are compared as one value.

    A callback that only one of them has is one key: a release may bring one that is on by default.
    """
    before, after = dict(_leaves(then)), dict(_leaves(now))
    on_then, on_now = _callbacks(then), _callbacks(now)
    for name in on_then ^ on_now:
        for leaves, on in ((before, on_then), (after, on_now)):
            for key in [k for k in leaves if k == name or k.startswith(f"{name}.")]:
                del leaves[key]
            if name in on:
                leaves[name] = _PRESENT
    return [
        ChangedKey(key, before.get(key, _ABSENT), after.get(key, _ABSENT))
        for key in sorted(before.keys() | after.keys())
        if not key.startswith(_NOT_COMPARED) and before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]


def changed_optimizers(changed: Iterable[ChangedKey]) -> dict[str, list[ChangedKey]]:
    """Return those of ``changed`` that are settings of optimizers, by role.

    A key that only one of the two has is no changed setting: which optimizers there are is
    compared by itself, by ``plan_resume``.
    """
    by_role: dict[str, list[ChangedKey]] = {}
    for change in changed:
        match = _OPTIMIZER.fullmatch(change.key)
        if match and _ABSENT not in (change.then, change.now):
            by_role.setdefault(match["role"], []).append(change)
    return by_role


def need_restart(changes: Iterable[ChangedKey]) -> list[ChangedKey]:
    """Return those of an optimizer's changed settings that its saved state does not go with."""
    return [c for c in changes if c.key.endswith((".optimizer.name", ".optimizer.betas"))]


def optimizers_problem(source: Path, by_role: Mapping[str, Iterable[ChangedKey]]) -> str:
    """Say why other settings of optimizers do not go with the state in ``source``."""
    entries = [f"optimizers.{role}" for role in by_role]
    listed = "; ".join(str(change) for changes in by_role.values() for change in changes)
    return (
        f"{source} cannot be resumed with other optimizer settings: {listed}. The optimizer's "
        "state in the checkpoint was made under the old ones, and would be wrong under the new "
        "ones, or overrule them without a sign. Put the old ones back, or start with the new ones "
        "in a new output folder (resume: none), or let just the optimizer start anew here, without "
        "its moments and update "
        f"count:\n{changes_section(added=entries, dropped=entries)}"
    )


def scale_problems(
    source: Path, then: Mapping[str, object], now: Mapping[str, object], loaded: Iterable[str]
) -> Iterator[tuple[str, str]]:
    """Yield the role and why its adapters would count more or less than they did: alpha / rank
    differs, which no shape shows.

    Args:
        loaded: roles whose weights are taken from the checkpoint.
    """
    for role in sorted(set(loaded)):
        before, after = _lora_scale(then, role), _lora_scale(now, role)
        if before is not None and after is not None and before != after:
            entries = [f"roles.{role}"]
            yield (
                role,
                f"{source} cannot be resumed with another scale of adapters: alpha / rank of the "
                f"LoRA of {role!r} is {before:g} in the checkpoint and {after:g} now. The same "
                "numbers would be other weights from one step to the next. Put the old alpha back, "
                "or start in a new output folder (resume: none), or let the role start anew here:\n"
                f"{changes_section(added=entries, dropped=entries)}",
            )


def _lora_scale(config: Mapping[str, Any], role: str) -> float | None:
    lora = ((config.get("models") or {}).get(role) or {}).get("lora")
    if not lora:
        return None
    alpha = lora.get("alpha")
    return 1.0 if alpha is None else alpha / lora["rank"]


def change_notes(
    changed: Iterable[ChangedKey], now: Mapping[str, object], kept: Iterable[str]
) -> list[str]:
    """Say what changed: a line for each optimizer that is kept, and for each other key.

    Args:
        kept: roles whose optimizers go on under other settings.
    """
    schedules = sorted(
        {
            str(value)
            for key, value in _leaves(now)
            if _SCHEDULE.fullmatch(key) and value != "constant"
        }
    )
    changed = list(changed)
    by_role = changed_optimizers(changed)
    notes = []
    for role in kept:
        settings = ", ".join(
            f"{change.key.partition('.optimizer.')[2]} {change.then!r} -> {change.now!r}"
            for change in by_role[role]
        )
        notes.append(
            f"the optimizer of {role} goes on with {settings}; its moments and its count of steps "
            "stay"
        )
    reported = {change.key for role in kept for change in by_role[role]}
    # training.optimizer is what settings of roles are derived from, and each role's are reported.
    derived = {change.key.partition(".optimizer.")[2] for c in by_role.values() for change in c}
    reported |= {f"training.optimizer.{setting}" for setting in derived}
    for change in changed:
        note = ""
        if change.key in reported:
            continue
        if change.key == "training.max_train_steps" and schedules:
            note = (
                f"; the {' and '.join(schedules)} schedule now ends at the new end, so the "
                "learning rate jumps here"
            )
        notes.append(f"{change}{note}")
    return notes


@frozen(kw_only=True)
class ResumePreview:
    """What a resume will find, read from run files and a few lines of JSON.

    Attributes:
        folder: the checkpoint.
        problems: settings that do not go with it; paths begin at the top of a run file.
        notes: what has changed, a line each.
        position: the first rank's data position.
        takes_other_data: a rule states that another data set is meant.
    """

    folder: Path
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    position: Mapping[str, object]
    takes_other_data: bool


def preview_resume(
    config: CheckpointConfig, output_dir: Path, resolved: Mapping[str, object]
) -> ResumePreview | None:
    """Look at the checkpoint that a run of these settings would resume, before anything is loaded.

    None where there is none, or where it cannot be read: ``CheckpointManager.resume`` reads every
    byte of it, and decides.
    """
    folder = _find_checkpoint(config, output_dir)
    if folder is None:
        return None
    now = json.loads(json.dumps(dict(resolved)))
    try:
        then = read_config(folder)
        contents = Contents.read(folder)
        loader = read_json(json_of(folder / "loader"))
    except (CheckpointError, UnreadableFileError):
        return None
    changed = changed_keys(then, now)
    by_role = changed_optimizers(changed)
    restarted = set(config.changes.added) & set(config.changes.dropped)
    # A restart that happened before the checkpoint was saved applies again to other settings.
    fresh = {role for role in by_role if {f"optimizers.{role}", f"roles.{role}"} & restarted}
    kept = [role for role in by_role if role not in fresh]
    refused = {role: found for role in kept if (found := need_restart(by_role[role]))}
    problems = [
        Problem(("models", role, "optimizer"), optimizers_problem(folder, {role: changes}))
        for role, changes in refused.items()
    ]
    loaded = [role for role in contents.by_role("roles") if f"roles.{role}" not in restarted]
    problems += [
        Problem(("models", role, "lora"), text)
        for role, text in scale_problems(folder, then, now, loaded)
    ]
    return ResumePreview(
        folder=folder,
        problems=tuple(problems),
        notes=tuple(change_notes(changed, now, [role for role in kept if role not in refused])),
        position=loader.get(rank_key(0), {}) if isinstance(loader, dict) else {},
        takes_other_data=DATA in restarted,
    )


def _find_checkpoint(config: CheckpointConfig, output_dir: Path) -> Path | None:
    if config.resume == "none":
        return None
    folders = [Path(config.resume)]
    if config.resume == "latest":
        folders = list(list_checkpoints(output_dir).values())
    intact = (f for f in folders if inspect(f, checksums=False).manifest is not None)
    return next(intact, None)


def _callbacks(config: Mapping[str, Any]) -> set[str]:
    return {
        f"callbacks.{name}"
        for name, value in (config.get("callbacks") or {}).items()
        if value is not None
    }


def _leaves(value: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
