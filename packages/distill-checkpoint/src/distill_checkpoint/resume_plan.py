"""What of a checkpoint goes into a run: everything, unless a rule states otherwise.

Which roles, optimizers, averages and callbacks there are is compared before any state is (as are
the settings of the two run files, in ``changed_settings.py``). What only one side has is an error
that spells out the ``ChangesConfig`` with which it is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from attrs import define, field, frozen
from distill_protocols import Callback, ModelBundle

from distill_checkpoint.changed_settings import DATA, changes_section
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


@frozen(kw_only=True)
class ResumePlan:
    """Which state is loaded, and the notes on the rest.

    Attributes:
        load: state that the checkpoint and the run both have, and that does not start anew.
        fresh: state of the run that starts as it is.
        problems: one line for each state that only one of both has, without a rule about it.
        way_out: the rules that would be needed, as a ``changes:`` section.
        notes: one line for each rule.
        other_settings: roles whose optimizers are loaded under other settings than they were saved
            with.
        takes_other_data: whether a data position that means nothing to the run's data set may be
            given up.
    """

    load: frozenset[StateKey]
    fresh: frozenset[StateKey]
    problems: tuple[str, ...]
    way_out: str
    notes: tuple[str, ...]
    other_settings: frozenset[str]
    takes_other_data: bool

    def modules(self, kind: str) -> set[ModuleKey]:
        """Return the modules whose state of ``kind`` is loaded."""
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
    changed_optimizers: Collection[str],
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
    # A callback without state may come and go: nothing of it is lost. So may one that only
    # observes: the run trains just the same.
    saved |= {
        (CALLBACKS, name)
        for name, has_state in contents.callbacks.items()
        if has_state and (name in callbacks or name not in contents.observers)
    }
    for name, callback in callbacks.items():
        had_state = contents.callbacks.get(name)
        is_new = had_state is None and not callback.only_observes
        if had_state or (is_new and callback.state_dict()):
            present.add((CALLBACKS, name))
    table = _Rules(rules, _applied_rules(contents, changed_optimizers))
    only_saved = {key for key in saved - present if not table.matches("dropped", key)}
    only_present = {key for key in present - saved if not table.matches("added", key)}
    both = set(rules.added) & set(rules.dropped)
    # In both lists: it restarts, once (see ``ChangesConfig``), as the checkpoint remembers it.
    anew = {key for key in saved & present if table.matches("anew", key)}
    load = frozenset((saved & present) - anew)
    return ResumePlan(
        load=load,
        fresh=frozenset((present - saved) | anew),
        problems=(
            *_one_sided(only_saved, "is in the checkpoint but not in the run"),
            *_one_sided(only_present, "is in the run but not in the checkpoint"),
        ),
        way_out=changes_section(
            added=_narrowest_rules(only_present), dropped=_narrowest_rules(only_saved)
        ),
        notes=tuple(table.notes()),
        other_settings=frozenset(
            key[1] for key in load if key[0] == "optimizers" and key[1] in changed_optimizers
        ),
        takes_other_data=DATA in both,
    )


def _applied_rules(contents: Contents, changed_optimizers: Iterable[str]) -> set[str]:
    """Return the restarts that happened before the checkpoint was saved, and do not happen
    again."""
    again = {f"optimizers.{role}" for role in changed_optimizers}
    return (set(contents.added) & set(contents.dropped)) - again


def _rules_about(key: StateKey) -> tuple[str, ...]:
    """Return the entries of a ``ChangesConfig`` that are about ``key``, the narrowest first."""
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
        """Return whether a rule of ``effect`` ("added", "dropped" or "anew": both) is about
        ``key``."""
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
                if entry == DATA:
                    continue  # reported where the position is loaded
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
