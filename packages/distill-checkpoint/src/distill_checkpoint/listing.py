"""What a checkpoint holds, by its small files alone: for checks that come before torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from distill_protocols import Problem

from distill_checkpoint.files import read_json
from distill_checkpoint.layout import checkpoints
from distill_checkpoint.manifest import is_checkpoint


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest one in a run's output folder that has a manifest."""
    return next((path for path in checkpoints(output_dir).values() if is_checkpoint(path)), None)


def role_problems(checkpoint: Path, role: str, *, ema: bool) -> Iterator[Problem]:
    """What is wrong with taking ``role`` (or its average) out: pairs of key and message."""
    try:
        loop = read_json(checkpoint / "loop.json")
        roles = list(dict.fromkeys(name for name, _ in loop["roles"]))
        averaged = list(dict.fromkeys(name for name, _ in loop["ema"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        yield Problem(
            "path",
            f"{checkpoint} cannot be read: its loop.json is missing or damaged ({error}); name "
            "another checkpoint",
        )
        return
    if role not in roles:
        has = ", ".join(roles) or "none"
        near = difflib.get_close_matches(role, roles, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        yield Problem(
            "role",
            f"there is no trained role {role!r} in {checkpoint}{hint} (it holds: {has}); frozen "
            "roles are not saved, they are what their own path says",
        )
    elif ema and role not in averaged:
        kept = ", ".join(averaged) or "none"
        yield Problem(
            "ema", f"{checkpoint} holds no average of {role!r} (of: {kept}); take the live ones"
        )
