"""Find the members of a workspace, so that no tool and no test lists the packages by hand."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Member:
    """One package or app of a workspace.

    Attributes:
        folder: where its ``pyproject.toml`` is.
        project: the ``[project]`` table of that file.
    """

    folder: Path
    project: dict[str, Any]

    @property
    def name(self) -> str:
        return self.project["name"]

    @property
    def version(self) -> str:
        return self.project["version"]

    @property
    def module(self) -> str:
        """Name under which Python imports it; its wheel's file name begins with it."""
        return self.name.replace("-", "_")

    @property
    def requirements(self) -> dict[str, Requirement]:
        """What it always needs, by name; extras are left out."""
        parsed = map(Requirement, self.project.get("dependencies", ()))
        return {requirement.name: requirement for requirement in parsed}


def read_members(root: Path = ROOT) -> dict[str, Member]:
    """Read each ``packages/*`` and ``apps/*`` of the workspace at ``root``, by name.

    Raises:
        SystemExit: there are none, so that ``root`` is not a checkout of this workspace.
    """
    files = sorted([*root.glob("packages/*/pyproject.toml"), *root.glob("apps/*/pyproject.toml")])
    members = [Member(f.parent, tomllib.loads(f.read_text())["project"]) for f in files]
    if not members:
        raise SystemExit(
            f"{root} has neither packages/*/pyproject.toml nor apps/*/pyproject.toml, which the "
            "members of this workspace have. Give the root of a checkout."
        )
    return {member.name: member for member in members}


def members_needed_by(name: str, members: dict[str, Member]) -> set[str]:
    """Collect ``name`` and the members that it needs, directly or through others."""
    needed: set[str] = set()
    pending = [name]
    while pending:
        current = pending.pop()
        if current not in needed:
            needed.add(current)
            pending.extend(members[current].requirements.keys() & members.keys())
    return needed
