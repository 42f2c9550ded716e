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
        follows_from: keys, from the same reporter, to a value; if something is wrong with that
            one, this problem merely follows from it and is not shown.
    """

    path: tuple[str, ...] = field(converter=_as_path)
    message: str
    follows_from: tuple[str, ...] | None = field(
        default=None, converter=lambda path: None if path is None else _as_path(path)
    )

    def below(self, *parents: str) -> Problem:
        """Return the same problem as seen from further up: ``parents`` come before its paths."""
        cause = self.follows_from
        return Problem(
            (*parents, *self.path), self.message, None if cause is None else (*parents, *cause)
        )


def below(problems: Iterable[Problem], *parents: str) -> Iterator[Problem]:
    """``problems`` as seen from further up: ``parents`` come before their paths."""
    return (problem.below(*parents) for problem in problems)
