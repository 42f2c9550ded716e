"""What is wrong with a value, as a value. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from attrs import field, frozen


def _as_path(path: str | Iterable[str]) -> tuple[str, ...]:
    """``"sampler.guidance"`` or its parts."""
    if isinstance(path, str):
        return tuple(path.split(".")) if path else ()
    return tuple(path)


@frozen
class Problem:
    """One thing that is wrong, and where.

    Attributes:
        path: keys from whoever reports it to the value: ``("sampler", "guidance")`` under a
            view. A string is split at its dots.
        message: the value, the rule, the reason and the way out, in at most three sentences.
    """

    path: tuple[str, ...] = field(converter=_as_path)
    message: str

    def below(self, *parents: str) -> Problem:
        """The same problem as seen from further up: ``parents`` come before its path."""
        return Problem((*parents, *self.path), self.message)


def below(problems: Iterable[Problem], *parents: str) -> Iterator[Problem]:
    """``problems`` as seen from further up: ``parents`` come before their paths."""
    return (problem.below(*parents) for problem in problems)
