"""Cases of a parametrised test of which a few stand for the rest: the others are slow ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def slow_but(
    kept: Collection[str], cases: Iterable[Any], name_of: Callable[[Any], str] = str
) -> list[Any]:
    """Mark cases slow, all but those of the names ``kept``.

    Args:
        kept: each must be the name of a case.
        cases: values of one argument, or tuples of several.
        name_of: the name of a case, which becomes its id.
    """
    named = {name_of(case): case for case in cases}
    unknown = set(kept) - set(named)
    assert not unknown, f"no such cases: {sorted(unknown)}"
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            id=name,
            marks=() if name in kept else pytest.mark.slow,
        )
        for name, case in named.items()
    ]
