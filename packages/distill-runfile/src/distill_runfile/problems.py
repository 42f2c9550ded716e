"""What is wrong with a run file, and where. No torch.

Passes yield ``distill_protocols.Problem`` with paths from the top of the file. Before they are
shown, those that merely follow from others are left out, and each gets its file and line.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from attrs import frozen
from distill_protocols import Problem
from distill_runtime import printable

KeyPath = tuple[str, ...]
"""Keys from the top of a file: ``("models", "student", "path")``."""


@frozen
class LocatedProblem:
    """One thing that is wrong, with the file and the line where it is written."""

    file: Path
    line: int
    path: KeyPath
    message: str

    def __str__(self) -> str:
        key = printable(".".join(self.path), one_line=True)
        name = printable(self.file.name, one_line=True)
        return f"{name}:{self.line}: {key + ': ' if key else ''}{printable(self.message)}"


def independent(problems: Iterable[Problem]) -> list[Problem]:
    """Leave out problems that follow from another one.

    A problem follows from another if that one lies at, below or above the path that the problem
    names in ``follows_from``: it would be gone, or would read otherwise, once the other is mended.
    """
    everything = list(problems)
    paths = {problem.path for problem in everything}

    def has_cause(problem: Problem) -> bool:
        cause = problem.follows_from
        return cause is not None and any(
            path != problem.path and _overlap(path, cause) for path in paths
        )

    return [problem for problem in everything if not has_cause(problem)]


def _overlap(a: KeyPath, b: KeyPath) -> bool:
    shorter = min(len(a), len(b))
    return shorter > 0 and a[:shorter] == b[:shorter]


def in_order(problems: Iterable[LocatedProblem], first: Path) -> list[LocatedProblem]:
    """Sort problems by file (``first`` before others) and line, and drop repetitions."""
    return sorted(dict.fromkeys(problems), key=lambda p: (p.file != first, str(p.file), p.line))
