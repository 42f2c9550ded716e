"""Which sections a file has."""

from __future__ import annotations

from collections.abc import Iterator

from distill_protocols import Problem

from distill_runfile.draft import Draft
from distill_runfile.structure import unknown_key

_BELONGS_BELOW = {
    "pipeline_config_path": "write it under pipeline_config: {pipeline_config_path: FILE}; keys "
    "beside it override those of the file",
}


def check_sections(draft: Draft) -> Iterator[Problem]:
    """Sections that nobody reads, and those that are missing."""
    for name in draft.document.values:
        if name in _BELONGS_BELOW:
            yield Problem((name,), f"is no section of its own: {_BELONGS_BELOW[name]}")
        elif name not in draft.known:
            yield Problem((name,), unknown_key(name, draft.known, owner=""))
    for name in draft.needed:
        if draft.document.values.get(name) is None:
            every = f"{', '.join(draft.needed[:-1])} and {draft.needed[-1]}"
            yield Problem((name,), f"missing section; every run file has {every}")
