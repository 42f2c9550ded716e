"""What of a checkpoint goes into a run: everything, unless a rule says otherwise.

Two things are compared before any state is: which roles, optimizers, averages and callbacks there
are, and the settings in the two run files. What only one side has, or what the saved state would
silently overrule, is an error that spells out the ``ChangesConfig`` with which it is meant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import define, field, frozen
from distill_protocols import Callback, CheckpointError, ModelBundle

from distill_checkpoint.config import ChangesConfig
from distill_checkpoint.manifest import KINDS, Contents, ModuleKey
from distill_checkpoint.snapshot import modules_by_kind

CALLBACKS = "callbacks"

StateKey = tuple[str, ...]
"""One state of a run: (kind, role, module), or ("callbacks", name)."""

_NOUNS = {
    "roles": "trained module",
    "optimizers": "optimizer",
    "schedulers": "schedule",
    "ema": "EMA",
    CALLBACKS: "callback",
}
_PLAIN = re.compile(r"[A-Za-z0-9_./-]+")


@frozen(kw_only=True)
class ResumePlan:
    """Which state is loaded, and what is to be said about the rest.

    Attributes:
        load: state that the checkpoint and the run both have, and that does not start anew.
        fresh: state of the run that starts as it is.
        problems: one line for each state that only one of both has, without a rule about it.
        way_out: the rules that would be needed, as a ``changes:`` section.
        notes: one line for each rule.
    """

    load: frozenset[StateKey]
    fresh: frozenset[StateKey]
    problems: tuple[str, ...]
    way_out: str
    notes: tuple[str, ...]

    def modules(self, kind: str) -> set[ModuleKey]:
        """The modules whose state of ``kind`` is loaded."""
        return {(key[1], key[2]) for key in self.load if key[0] == kind}

    @property
    def callbacks(self) -> set[str]:
        """The callbacks whose state is loaded."""
        return {key[1] for key in self.load if key[0] == CALLBACKS}


def plan_resume(
    contents: Contents,
    bundle: ModelBundle,
    callbacks: Mapping[str, Callback],
    rules: ChangesConfig,
    changed_optimizers: Iterable[str],
) -> ResumePlan:
    """Compare what a checkpoint lists with what the run has.

    Args:
        changed_optimizers: roles whose optimizer settings differ: a rule that restarts their
            optimizers applies even to a checkpoint that was saved under it.
    """
    saved: set[StateKey] = {(kind, *key) for kind in KINDS for key in contents.modules[kind]}
    present: set[StateKey] = {
        (kind, *key) for kind, keys in modules_by_kind(bundle).items() for key in keys
    }
    # A callback without state may come and go: nothing of it is lost.
    saved |= {(CALLBACKS, name) for name, has_state in contents.callbacks.items() if has_state}
    for name, callback in callbacks.items():
        had_state = contents.callbacks.get(name)
        if had_state or (had_state is None and callback.state_dict()):
            present.add((CALLBACKS, name))
    table = _Rules(rules, _applied_rules(contents, changed_optimizers))
    only_saved = {key for key in saved - present if not table.matches("dropped", key)}
    only_present = {key for key in present - saved if not table.matches("added", key)}
    # In both lists: it restarts, once (see ``ChangesConfig``), as the checkpoint remembers it.
    anew = {key for key in saved & present if table.matches("anew", key)}
    return ResumePlan(
        load=frozenset((saved & present) - anew),
        fresh=frozenset((present - saved) | anew),
        problems=(
            *_one_sided(only_saved, "is in the checkpoint but not in the run"),
            *_one_sided(only_present, "is in the run but not in the checkpoint"),
        ),
        way_out=_changes_section(
            added=_narrowest_rules(only_present), dropped=_narrowest_rules(only_saved)
        ),
        notes=tuple(table.notes()),
    )


def _applied_rules(contents: Contents, changed_optimizers: Iterable[str]) -> set[str]:
    """The restarts that happened before the checkpoint was saved, and do not happen again."""
    again = {f"optimizers.{role}" for role in changed_optimizers}
    return (set(contents.added) & set(contents.dropped)) - again


def _rules_about(key: StateKey) -> tuple[str, ...]:
    """The entries of a ``ChangesConfig`` that are about ``key``, the narrowest first."""
    kind, name = key[0], key[1]
    if kind == CALLBACKS:
        return (f"{CALLBACKS}.{name}",)
    narrow = {"optimizers": "optimizers", "schedulers": "optimizers", "ema": "ema"}.get(kind)
    return (*([f"{narrow}.{name}"] if narrow else []), f"roles.{name}")


def _narrowest_rules(keys: set[StateKey]) -> set[str]:
    whole_roles = {key[1] for key in keys if key[0] == "roles"}
    return {_rules_about(key)[-1 if key[1] in whole_roles else 0] for key in keys}


@define
class _Rules:
    """A ``ChangesConfig``, and which of its entries were about something."""

    _rules: ChangesConfig
    _applied_before: set[str]
    _used: dict[tuple[str, str], list[StateKey]] = field(factory=dict)

    def matches(self, effect: str, key: StateKey) -> bool:
        """Whether a rule of ``effect`` ("added", "dropped" or "anew": both) is about ``key``."""
        added, dropped = set(self._rules.added), set(self._rules.dropped)
        entries = {
            "added": added,
            "dropped": dropped,
            "anew": (added & dropped) - self._applied_before,
        }[effect]
        for entry in _rules_about(key):
            if entry in entries:
                self._used.setdefault((effect, entry), []).append(key)
                return True
        return False

    def notes(self) -> Iterator[str]:
        texts = {
            "added": "{0} is added (changes): it starts as it is ({1})",
            "dropped": "{0} is dropped (changes): nothing of it is loaded ({1})",
            "anew": "{0} is dropped and added (changes): it starts anew ({1})",
        }
        for (effect, entry), keys in self._used.items():
            yield texts[effect].format(entry, _listed(keys))
        for effect, entries in (("added", self._rules.added), ("dropped", self._rules.dropped)):
            for entry in entries:
                if not {(effect, entry), ("anew", entry)} & self._used.keys():
                    yield (
                        f"changes.{effect}: {entry} matches nothing, so it changes nothing (it is "
                        "done already, or both have it, or neither)"
                    )


def _one_sided(keys: set[StateKey], where: str) -> list[str]:
    by_kind: dict[str, list[str]] = {}
    for kind, *names in sorted(keys):
        by_kind.setdefault(kind, []).append(".".join(names))
    order: Callable[[str], int] = list(_NOUNS).index
    return [
        f"{_NOUNS[kind]} {', '.join(by_kind[kind])} {where}" for kind in sorted(by_kind, key=order)
    ]


def _listed(keys: Iterable[StateKey]) -> str:
    nouns = {**_NOUNS, "roles": "weights", CALLBACKS: "state"}
    by_noun: dict[str, list[str]] = {}
    for kind, *names in sorted(keys):
        by_noun.setdefault(nouns[kind], []).append(names[-1])
    return "; ".join(f"{noun} of {', '.join(names)}" for noun, names in by_noun.items())


def _changes_section(*, added: Iterable[str] = (), dropped: Iterable[str] = ()) -> str:
    """The ``ChangesConfig`` of these entries as YAML."""
    lines = ["changes:"]
    for name, entries in (("added", sorted(added)), ("dropped", sorted(dropped))):
        if entries:
            # JSON's strings are YAML's.
            scalars = [entry if _PLAIN.fullmatch(entry) else json.dumps(entry) for entry in entries]
            lines.append(f"  {name}: [{', '.join(scalars)}]")
    return "\n".join(lines)


# -- the two run files ----------------------------------------------------------------------------

# A role's own section holds training.optimizer too: it is what its optimizer was made from.
_OPTIMIZER = re.compile(r"models\.(?P<role>.+?)\.optimizer\..+")
_SCHEDULE = re.compile(r"(training|models\.[^.]+)\.optimizer\.schedule\.name")
# These tell where and how to resume: they nearly always differ, and are over once that is done.
_NOT_COMPARED = ("checkpoint.resume", "checkpoint.changes")
_ABSENT = object()


@frozen
class ChangedKey:
    """One key of the run file that is not as it was."""

    key: str
    then: Any
    now: Any

    def __str__(self) -> str:
        then, now = ("absent" if v is _ABSENT else repr(v) for v in (self.then, self.now))
        return f"{self.key} is {then} in the checkpoint and {now} now"


def changed_keys(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[ChangedKey]:
    """Keys, joined by dots, whose values differ; lists are compared as one value."""
    before, after = dict(_leaves(then)), dict(_leaves(now))
    return [
        ChangedKey(key, before.get(key, _ABSENT), after.get(key, _ABSENT))
        for key in sorted(before.keys() | after.keys())
        if not key.startswith(_NOT_COMPARED) and before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]


def changed_optimizers(changed: Iterable[ChangedKey]) -> dict[str, list[ChangedKey]]:
    """Those of ``changed`` that are settings of optimizers, by role.

    A key that only one of the two has is no changed setting: which optimizers there are is
    compared by itself, by ``plan_resume``.
    """
    by_role: dict[str, list[ChangedKey]] = {}
    for change in changed:
        match = _OPTIMIZER.fullmatch(change.key)
        if match and _ABSENT not in (change.then, change.now):
            by_role.setdefault(match["role"], []).append(change)
    return by_role


def refuse_changed_optimizers(source: Path, by_role: Mapping[str, list[ChangedKey]]) -> None:
    """Refuse other settings of optimizers that do not start anew.

    Raises:
        CheckpointError: there are some: their state carries the old values.
    """
    if not by_role:
        return
    entries = [f"optimizers.{role}" for role in by_role]
    listed = "; ".join(str(change) for changes in by_role.values() for change in changes)
    raise CheckpointError(
        f"{source} cannot be resumed with other optimizer settings: {listed}. The optimizer's "
        "state in the checkpoint carries the old values, so the new ones would be dropped without "
        "a sign. Put the old ones back, or start with the new ones in a new output folder "
        "(resume: none), or let just the optimizer start anew here, without its moments and update "
        f"count:\n{_changes_section(added=entries, dropped=entries)}"
    )


def refuse_changed_scales(
    source: Path, then: Mapping[str, Any], now: Mapping[str, Any], loaded: Iterable[str]
) -> None:
    """Refuse adapters that would count more or less than they did: no shape shows it.

    Args:
        loaded: roles whose weights are taken from the checkpoint.

    Raises:
        CheckpointError: alpha / rank of a role's LoRA differs.
    """
    for role in sorted(set(loaded)):
        before, after = _lora_scale(then, role), _lora_scale(now, role)
        if before is not None and after is not None and before != after:
            entries = [f"roles.{role}"]
            raise CheckpointError(
                f"{source} cannot be resumed with another scale of adapters: alpha / rank of the "
                f"LoRA of {role!r} is {before:g} in the checkpoint and {after:g} now. The same "
                "numbers would be other weights from one step to the next. Put the old alpha back, "
                "or start in a new output folder (resume: none), or let the role start anew here:\n"
                f"{_changes_section(added=entries, dropped=entries)}"
            )


def _lora_scale(config: Mapping[str, Any], role: str) -> float | None:
    lora = ((config.get("models") or {}).get(role) or {}).get("lora")
    if not lora:
        return None
    alpha = lora.get("alpha")
    return 1.0 if alpha is None else alpha / lora["rank"]


def change_notes(changed: Iterable[ChangedKey], now: Mapping[str, Any]) -> list[str]:
    """One line for each changed key."""
    schedules = sorted(
        {
            str(value)
            for key, value in _leaves(now)
            if _SCHEDULE.fullmatch(key) and value != "constant"
        }
    )
    notes = []
    for change in changed:
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
