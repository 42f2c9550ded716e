"""Prepare the release of one package: version, changelog, bounds, lock file, wheels and tag.

    uv run python tools/release.py distill-trainer --bump minor --dry-run
    uv run python tools/release.py distill-trainer --bump minor

The first command prints the changes and makes none. The second one makes them, builds every member,
checks the sdist and the wheel of the package, installs all wheels in a fresh environment, and
prints the tag to create. If one of these steps fails, the tree is put back as it was. With `--tag`
the changes are committed and the tag is created as well. Nothing is ever pushed or uploaded.

The bounds of the package in the other members follow one rule:

- A minor or patch release leaves them alone: `>=2.0,<3` admits 2.1.0 already. `--raise-lower` makes
  them `>=2.1,<3`, for a release without which the other members no longer work.
- A major release makes them `>=3.0,<4`: nobody has tried the new members with the old package. Each
  member whose bounds change gets a line in its changelog, and is due for a release of its own.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from check_wheels import build_packages, content_problems, install_wheels
from packaging.version import Version
from workspace import ROOT, Member, read_members

UNRELEASED = re.compile(r"^## Unreleased\n(?P<entries>.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Release:
    """The changes that a release makes to the tree.

    Attributes:
        name: the package.
        version: what it becomes.
        texts: new contents of the files that change, the version number aside.
        dependents: members whose bounds change.
    """

    name: str
    version: Version
    texts: dict[Path, str]
    dependents: tuple[str, ...]

    @property
    def tag(self) -> str:
        return f"{self.name}-v{self.version}"


def main(arguments: list[str] | None = None, root: Path = ROOT) -> None:
    options = parse_arguments(arguments)
    members = read_members(root)
    if options.package not in members:
        close = difflib.get_close_matches(options.package, members, n=1)
        raise SystemExit(
            f"{options.package} is no package of this workspace. "
            + (f"Did you mean {close[0]}?" if close else f"There are {', '.join(members)}.")
        )
    member = members[options.package]
    bump = ["uv", "version", "--package", member.name, "--bump", options.bump]
    version = Version(read_output(*bump, "--dry-run", "--short", cwd=root))
    problems = list(find_problems(root, member, f"{member.name}-v{version}"))
    if problems:
        raise SystemExit("\n".join(problems))
    release = plan_release(members, member, version, options.raise_lower)
    print(f"{release.name} {member.version} -> {release.version}")
    if options.dry_run:
        print(format_changes(root, release), end="")
        print(f"Nothing is changed (--dry-run). The tag would be {release.tag}")
        return
    apply_release(root, release, bump)
    if options.tag:
        read_output("git", "commit", "--all", "-m", f"Release {release.tag}", cwd=root)
        read_output("git", "tag", "--annotate", release.tag, "-m", release.tag, cwd=root)
        print(f"Committed and tagged as {release.tag}")
    else:
        print(f"Review and commit the changes, then create the tag {release.tag}")
    if release.dependents:
        print(f"Release these next, as their bounds changed: {', '.join(release.dependents)}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prepare the release of one package.")
    parser.add_argument("package")
    parser.add_argument("--bump", choices=["major", "minor", "patch"], required=True)
    parser.add_argument("--raise-lower", action="store_true", help="members need this version")
    parser.add_argument("--dry-run", action="store_true", help="print the changes, make none")
    parser.add_argument("--tag", action="store_true", help="commit the changes and create the tag")
    return parser.parse_args(arguments)


def find_problems(root: Path, member: Member, tag: str) -> Iterator[str]:
    """Yield every reason against a release now."""
    changed = read_output("git", "status", "--porcelain", cwd=root)
    if changed:
        yield (
            f"The tree has changes that are not committed:\n{changed}\nA release is made of "
            "committed files alone, and is rolled back to them if a check fails. Commit or stash."
        )
    changelog = member.folder / "CHANGELOG.md"
    section = UNRELEASED.search(changelog.read_text())
    if section is None or not section["entries"].strip():
        yield (
            f"{changelog.relative_to(root)} has nothing under `## Unreleased`. Users read there "
            "what a version changes: write it down first."
        )
    if read_output("git", "tag", "--list", tag, cwd=root):
        yield f"The tag {tag} exists already, so that version is out. Choose another --bump."


def plan_release(
    members: dict[str, Member], member: Member, version: Version, raise_lower: bool
) -> Release:
    """Work out the new texts of changelogs and `pyproject.toml` files."""
    changelog = member.folder / "CHANGELOG.md"
    texts = {changelog: close_unreleased(changelog.read_text(), version)}
    dependents = []
    if raise_lower or version.major > Version(member.version).major:
        bounds = f">={shorten(version)},<{version.major + 1}"
        for other in members.values():
            project = other.folder / "pyproject.toml"
            text = replace_bounds(project.read_text(), member.name, bounds)
            if text != project.read_text():
                dependents.append(other.name)
                texts[project] = text
                notes = other.folder / "CHANGELOG.md"
                texts[notes] = add_entry(notes.read_text(), f"Needs `{member.name}{bounds}`.")
    return Release(member.name, version, texts, tuple(dependents))


def apply_release(root: Path, release: Release, bump: list[str]) -> None:
    """Make the changes and check the packages; put the tree back if anything fails."""
    try:
        read_output(*bump, "--frozen", cwd=root)
        for path, text in release.texts.items():
            path.write_text(text)
        read_output("uv", "lock", cwd=root)
        check_packages(root, release.name)
    except BaseException as error:
        read_output("git", "restore", ".", cwd=root)
        print("The release failed. The tree is as it was before.")
        if isinstance(error, subprocess.CalledProcessError):  # Its complaint is on the screen.
            raise SystemExit(f"`{' '.join(error.cmd[:3])}` failed") from error
        raise


def shorten(version: Version) -> str:
    """Write 2.1.0 as 2.1 and 2.1.3 in full."""
    return str(version).removesuffix(".0") if version.micro == 0 else str(version)


def replace_bounds(text: str, name: str, bounds: str) -> str:
    """Replace the bounds of ``name`` wherever a `pyproject.toml` requires it with bounds."""
    return re.sub(rf'"({re.escape(name)}(?:\[[^]"]*\])?)\s*[<>=~!][^";]*', rf'"\g<1>{bounds}', text)


def close_unreleased(text: str, version: Version) -> str:
    """Move the entries under `Unreleased` to a section of ``version`` with the date of today."""
    heading = f"## {version} ({datetime.date.today().isoformat()})"
    return (
        UNRELEASED.sub(
            lambda section: f"## Unreleased\n\n{heading}\n\n{section['entries'].strip()}\n\n", text
        ).rstrip("\n")
        + "\n"
    )


def add_entry(text: str, entry: str) -> str:
    """Add ``entry`` to the section `Unreleased`, and the section where there is none."""
    if UNRELEASED.search(text) is None:
        text = re.sub(r"(?=^## )|\Z", "## Unreleased\n\n", text, count=1, flags=re.MULTILINE)

    def append(section: re.Match[str]) -> str:
        entries = section["entries"].strip()
        is_list = entries.rpartition("\n\n")[2].startswith("- ")
        gap = "\n" if is_list else "\n\n" if entries else ""
        return f"## Unreleased\n\n{entries}{gap}- {entry}\n\n"

    return UNRELEASED.sub(append, text).rstrip("\n") + "\n"


def check_packages(root: Path, name: str) -> None:
    """Build all members, check the files of ``name``, and install all wheels together."""
    with tempfile.TemporaryDirectory() as folder:
        dist = Path(folder) / "dist"
        build_packages(root, dist)
        problems = list(content_problems(read_members(root)[name], dist))
        if problems:
            raise SystemExit("\n".join(problems))
        install_wheels(Path(folder) / "venv", sorted(dist.glob("*.whl")))


def format_changes(root: Path, release: Release) -> str:
    """Format the changes of all files as one unified diff."""
    lines: list[str] = []
    for path, text in release.texts.items():
        name = str(path.relative_to(root))
        old, new = (t.splitlines(keepends=True) for t in (path.read_text(), text))
        lines += difflib.unified_diff(old, new, name, name, n=1)
    return "".join(lines)


def read_output(*command: str, cwd: Path) -> str:
    """Run a command and give what it prints; its complaint ends the release."""
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"`{' '.join(command)}` failed:\n{result.stderr.strip()}")
    return result.stdout.strip("\n")


if __name__ == "__main__":
    main()
