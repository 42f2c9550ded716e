"""What computed a data set, as named entries, and whether a run's own parts are the same. No torch.

A fingerprint is a mapping of dotted names to short texts: ``vae.weights`` (a hash),
``text_encoder.precision`` (``bf16``), ``text_encoder.config.num_heads`` (``64``). The part before
the first dot is the component. A family chooses the entries (``FamilyPlugin.fingerprint``,
``LatentCodec.latent_fingerprint``, ``ConditionEncoder.condition_fingerprint``); here they are only
compared, name by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from attrs import frozen
from distill_protocols import WHOLE_ENCODER, Fingerprint

_HASH = re.compile(r"[0-9a-f]{32,}")
_SHOWN = 4


@frozen(kw_only=True)
class Difference:
    """One entry that is not the same in the data set and in the run."""

    name: str
    stored: str
    own: str

    def __str__(self) -> str:
        return f"{self.name} is {_short(self.stored)} in the data set and {_short(self.own)} here"


@frozen(kw_only=True)
class Comparison:
    """What came of comparing a data set's fingerprint with a run's.

    Entries that only one of both has are not compared: other releases of a library write more or
    fewer settings with their defaults.

    Attributes:
        differences: entries that differ and are not accepted.
        accepted: entries that differ and are accepted.
        unknown: names that are to be accepted and that neither of both has.
        components: all that one of both has.
        not_recorded: components of the run of which the data set has no entry.
        not_here: components of the data set of which the run has none, as their files are not on
            this machine.
    """

    differences: tuple[Difference, ...]
    accepted: tuple[Difference, ...]
    unknown: tuple[str, ...]
    components: tuple[str, ...]
    not_recorded: tuple[str, ...]
    not_here: tuple[str, ...]

    def problems(self, what: str) -> list[str]:
        """Say what is wrong, each problem in one text; ``what`` is the data set."""
        found = [self._difference_problem(what)] if self.differences else []
        known = ", ".join(self.components) or "none"
        return found + [
            f"{name!r} is to be accepted, but nothing of that name computed {what}, so it would "
            f"have no effect. Name an entry that differs, or a component for all of its entries "
            f"({known})"
            for name in self.unknown
        ]

    def notes(self, what: str) -> list[str]:
        """Say once what is not compared, and what differs and was accepted."""
        notes = []
        if self.accepted:
            notes.append(f"{what}: accepted, though {_listed(self.accepted)}")
        if self.not_recorded:
            notes.append(
                f"{what} does not record which {' and '.join(self.not_recorded)} computed it (it "
                "was made by an earlier release, or by hand), so these are taken to be the run's"
            )
        if self.not_here:
            notes.append(
                f"{what} cannot be compared with the run's {' and '.join(self.not_here)}, which "
                "are not on this machine; it is taken at its word"
            )
        return notes

    def _difference_problem(self, what: str) -> str:
        names = [difference.name for difference in self.differences]
        if names == [WHOLE_ENCODER]:
            hint = (
                " (it records one hash of all encoder and tokenizer files and of precision and "
                "length; files that compute nothing count in it too)"
            )
        else:
            hint = ""
        components = list(dict.fromkeys(map(_component, names)))
        accepted = ", ".join(names if len(names) <= _SHOWN else components)
        return (
            f"{what} was computed by other parts than this run's: {_listed(self.differences)}"
            f"{hint}. What one encodes means other things, or nothing, to a model that reads the "
            "other's. Preprocess the clips with the run's parts, or run with those of the data "
            f"set, or accept the difference by name if you know it to be harmless: {accepted}"
        )


def compare_fingerprints(
    stored: Fingerprint, own: Fingerprint, accept: Iterable[str] = ()
) -> Comparison:
    """Compare entry by entry.

    Args:
        stored: of a data set.
        own: of the run.
        accept: names of entries that may differ; a component's name stands for all its entries.
    """
    if without_whole_encoder(stored):
        stored = without_whole_encoder(stored)
    differences = [
        Difference(name=name, stored=stored[name], own=own[name])
        for name in sorted(stored.keys() & own.keys())
        if stored[name] != own[name]
    ]
    accept = list(accept)
    accepted = [d for d in differences if any(_covers(entry, d.name) for entry in accept)]
    named = without_whole_encoder(own)
    names = [*stored, *named]
    return Comparison(
        differences=tuple(d for d in differences if d not in accepted),
        accepted=tuple(accepted),
        unknown=tuple(e for e in accept if not any(_covers(e, name) for name in names)),
        components=tuple(dict.fromkeys(map(_component, names))),
        not_recorded=_only_in(named, stored),
        not_here=_only_in(stored, own),
    )


def without_whole_encoder(fingerprint: Fingerprint) -> dict[str, str]:
    """Return the named entries alone."""
    return {name: value for name, value in fingerprint.items() if name != WHOLE_ENCODER}


def _covers(entry: str, name: str) -> bool:
    return name == entry or name.startswith(f"{entry}.")


def _component(name: str) -> str:
    return name.partition(".")[0]


def _only_in(one: Fingerprint, other: Fingerprint) -> tuple[str, ...]:
    have = {_component(name) for name in other}
    if WHOLE_ENCODER in have:  # it stands for both
        have |= {component for component in map(_component, one) if "encoder" in component}
        have.add("tokenizer")
    return tuple(sorted({_component(name) for name in one} - have))


def _listed(differences: Sequence[Difference]) -> str:
    more = len(differences) - _SHOWN
    shown = "; ".join(map(str, differences[:_SHOWN]))
    return f"{shown}; and {more} more" if more > 0 else shown


def _short(value: str) -> str:
    return value[:12] if _HASH.fullmatch(value) else value
