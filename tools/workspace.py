"""Find the members of a workspace, so that no tool and no test lists the packages by hand."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        """Name under which Python imports it."""
        return self.name.replace("-", "_")


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
