"""What of a checkpoint goes into a run: everything, unless a rule says otherwise."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from attrs import define, field, frozen
from distill_protocols import Callback, ModelBundle

from distill_checkpoint.config import ChangesConfig
from distill_checkpoint.layout import Part
from distill_checkpoint.parts import kinds

NOUNS = {"roles": "weights", "optimizers": "optimizer", "schedulers": "schedule", "ema": "EMA"}
CALLBACKS = "callbacks"
_PLAIN = re.compile(r"[A-Za-z0-9_./-]+")

Thing = tuple[str, ...]
"""(kind, role, module), or ("callbacks", name)."""


@frozen(kw_only=True)
class Fit:
    """What is loaded, and what is to be said about the rest.

    Attributes:
        load: things that the checkpoint and the run both have, and that do not start anew.
        fresh: things of the run that start as they are.
        problems: one line a thing that only one of both has, and no rule is about.
        way_out: the rule that would be, as it is to be written into the run file.
        notes: one line a rule.
    """

    load: frozenset[Thing]
    fresh: frozenset[Thing]
    problems: tuple[str, ...]
    way_out: str
    notes: tuple[str, ...]

    def parts(self, kind: str) -> set[Part]:
        """(role, module) of what is loaded of ``kind``."""
        return {(thing[1], thing[2]) for thing in self.load if thing[0] == kind}


def fit(
    loop: Mapping[str, Any],
    bundle: ModelBundle,
    callbacks: Mapping[str, Callback],
    rules: ChangesConfig,
    reset: Iterable[str],
) -> Fit:
    """Compare what ``loop.json`` lists with what the run has.

    Args:
        reset: roles whose optimizer settings differ: a rule that restarts their optimizers holds
            even for a checkpoint that was saved under it.
    """
    saved, present = _saved(loop), _present(bundle)
    for name, has_state in loop["callbacks"].items():
        # A callback without state may come and go: nothing of it is lost.
        if has_state:
            saved.add((CALLBACKS, name))
    for name, callback in callbacks.items():
        known = loop["callbacks"].get(name)
        if known or (known is None and callback.state_dict()):
            present.add((CALLBACKS, name))
    table = _Rules(rules, _spent(loop, reset))
    only_saved = {thing for thing in saved - present if not table.covers("dropped", thing)}
    only_present = {thing for thing in present - saved if not table.covers("added", thing)}
    anew = {thing for thing in saved & present if table.restarts(thing)}
    return Fit(
        load=frozenset((saved & present) - anew),
        fresh=frozenset((present - saved) | anew),
        problems=(
            *_one_sided(only_saved, "is in the checkpoint but not in the run"),
            *_one_sided(only_present, "is in the run but not in the checkpoint"),
        ),
        way_out=changes_yaml(added=_suggest(only_present), dropped=_suggest(only_saved)),
        notes=tuple(table.notes()),
    )


def changes_yaml(*, added: Iterable[str] = (), dropped: Iterable[str] = ()) -> str:
    """``checkpoint.changes`` as it stands in a run file."""
    lines = ["checkpoint:", "  changes:"]
    for name, entries in (("added", sorted(added)), ("dropped", sorted(dropped))):
        if entries:
            lines.append(f"    {name}: [{', '.join(map(_scalar, entries))}]")
    return "\n".join(lines)


def _scalar(entry: str) -> str:
    # JSON's strings are YAML's.
    return entry if _PLAIN.fullmatch(entry) else json.dumps(entry)


def _saved(loop: Mapping[str, Any]) -> set[Thing]:
    return {(kind, *part) for kind in NOUNS for part in loop[kind]}


def _present(bundle: ModelBundle) -> set[Thing]:
    return {(kind, *part) for kind, parts in kinds(bundle).items() for part in parts}


def _entries(thing: Thing) -> tuple[str, ...]:
    """Rules that are about it, the narrowest first."""
    kind, name = thing[0], thing[1]
    if kind == CALLBACKS:
        return (f"{CALLBACKS}.{name}",)
    narrow = {"optimizers": "optimizers", "schedulers": "optimizers", "ema": "ema"}.get(kind)
    return (*([f"{narrow}.{name}"] if narrow else []), f"roles.{name}")


def _suggest(things: set[Thing]) -> set[str]:
    whole = {thing[1] for thing in things if thing[0] == "roles"}
    return {_entries(thing)[-1 if thing[1] in whole else 0] for thing in things}


def _spent(loop: Mapping[str, Any], reset: Iterable[str]) -> set[str]:
    then = loop["changes"]
    again = {f"optimizers.{role}" for role in reset}
    return (set(then["added"]) & set(then["dropped"])) - again


@define
class _Rules:
    """Who made use of which rule."""

    _rules: ChangesConfig
    _spent: set[str]
    _used: dict[tuple[str, str], list[Thing]] = field(factory=dict)

    def covers(self, which: str, thing: Thing) -> bool:
        listed = self._rules.added if which == "added" else self._rules.dropped
        for entry in _entries(thing):
            if entry in listed:
                self._used.setdefault((which, entry), []).append(thing)
                return True
        return False

    def restarts(self, thing: Thing) -> bool:
        both = (set(self._rules.added) & set(self._rules.dropped)) - self._spent
        for entry in _entries(thing):
            if entry in both:
                self._used.setdefault(("anew", entry), []).append(thing)
                return True
        return False

    def notes(self) -> list[str]:
        said = {
            "added": "{0} is added (checkpoint.changes): it starts as it is ({1})",
            "dropped": "{0} is dropped (checkpoint.changes): nothing of it is loaded ({1})",
            "anew": "{0} is dropped and added (checkpoint.changes): it starts anew ({1})",
        }
        lines = [
            said[w].format(entry, _listed(things)) for (w, entry), things in self._used.items()
        ]
        for which, entries in (("added", self._rules.added), ("dropped", self._rules.dropped)):
            for entry in entries:
                if not {(which, entry), ("anew", entry)} & self._used.keys():
                    lines.append(
                        f"checkpoint.changes.{which}: {entry} matches nothing, so it changes "
                        "nothing (it is done already, or both have it, or neither)"
                    )
        return lines


def _one_sided(things: set[Thing], where: str) -> list[str]:
    by_kind: dict[str, list[str]] = {}
    for kind, *names in sorted(things):
        by_kind.setdefault(kind, []).append(".".join(names))
    nouns = {**NOUNS, "roles": "trained module", CALLBACKS: "callback"}
    order: Callable[[str], int] = [*NOUNS, CALLBACKS].index
    return [f"{nouns[k]} {', '.join(by_kind[k])} {where}" for k in sorted(by_kind, key=order)]


def _listed(things: Iterable[Thing]) -> str:
    nouns = {**NOUNS, CALLBACKS: "state"}
    found: dict[str, list[str]] = {}
    for kind, *names in sorted(things):
        found.setdefault(nouns[kind], []).append(names[-1])
    return "; ".join(f"{noun} of {', '.join(names)}" for noun, names in found.items())
