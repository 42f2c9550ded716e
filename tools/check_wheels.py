"""Build every package as sdist and wheel, check the files, and use them outside the workspace.

    uv run python tools/check_wheels.py

The wheels are installed twice, each time in a fresh environment: all of them, then distill-trainer
with the members that it needs alone. `uv lock` does not look at version bounds between members;
installing the wheels does.
"""

from __future__ import annotations

import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from packaging.metadata import parse_email
from workspace import ROOT, Member, members_needed_by, read_members


def main() -> None:
    members = read_members()
    with tempfile.TemporaryDirectory() as folder:
        dist = Path(folder) / "dist"
        build_packages(ROOT, dist)
        problems = [p for member in members.values() for p in content_problems(member, dist)]
        if problems:
            raise SystemExit("\n".join(problems))
        wheels = sorted(dist.glob("*.whl"))
        install_wheels(Path(folder) / "all", wheels)
        run(str(Path(folder) / "all" / "bin" / "distill-train"), "--plugins", cwd=dist)
        light = {members[name].module for name in members_needed_by("distill-trainer", members)}
        script = (
            "import distill_trainer, importlib.util as u; distill_trainer.DistillTrainer;"
            "assert u.find_spec('diffusers') is None and u.find_spec('transformers') is None"
        )
        install_wheels(Path(folder) / "light", [w for w in wheels if w.name.split("-")[0] in light])
        run(str(Path(folder) / "light" / "bin" / "python"), "-c", script, cwd=dist)
    print(f"{len(wheels)} wheels install together, distill-trainer works alone")


def build_packages(root: Path, out: Path) -> None:
    """Build the sdist of every member of the workspace at ``root``, and from it the wheel."""
    run("uv", "build", "--quiet", "--all-packages", "--no-sources", "--out-dir", str(out), cwd=root)


def install_wheels(venv: Path, wheels: list[Path]) -> None:
    """Install by path (the bare name distill-trainer belongs to somebody else) and check bounds."""
    run("uv", "venv", "--quiet", str(venv))
    python = str(venv / "bin" / "python")
    run("uv", "pip", "install", "--quiet", "--python", python, *map(str, wheels))
    run("uv", "pip", "check", "--python", python)


def content_problems(member: Member, dist: Path) -> Iterator[str]:
    """Yield what is missing in the sdist and the wheel of ``member`` in the folder ``dist``."""
    stem = f"{member.module}-{member.version}"
    with tarfile.open(dist / f"{stem}.tar.gz") as sdist:
        for name in {"LICENSE", "README.md", "pyproject.toml"} - {
            file.removeprefix(f"{stem}/") for file in sdist.getnames()
        }:
            yield f"{stem}.tar.gz has no {name}. Put one into {member.folder}."
    wheel = zipfile.ZipFile(dist / f"{stem}-py3-none-any.whl")
    info = f"{stem}.dist-info"
    for file in {f"{info}/licenses/LICENSE", f"{member.module}/py.typed"} - set(wheel.namelist()):
        yield (
            f"The wheel {stem} has no {file}, which users of the package need. Put the file into "
            f"{member.folder} and name the licence in `license-files`."
        )
    metadata, _ = parse_email(wheel.read(f"{info}/METADATA"))
    for key, expected in expected_metadata(member).items():
        if metadata.get(key) != expected:
            yield (
                f"The metadata of the wheel {stem} have {key} = {metadata.get(key)!r} and must "
                f"have {expected!r}. Mend the [project] table in {member.folder}/pyproject.toml."
            )


def expected_metadata(member: Member) -> dict[str, object]:
    """Give the fields that the wheel of every member has to have (PEP 639 for the licence)."""
    return {
        "name": member.name,
        "version": member.version,
        "license_expression": "Apache-2.0",
        "license_files": ["LICENSE"],
        "requires_python": member.project["requires-python"],
        "classifiers": member.project["classifiers"],
    }


def run(*command: str, cwd: Path = ROOT) -> None:
    print("$", " ".join(command[:4]), flush=True)
    subprocess.run(command, cwd=cwd, check=True)


if __name__ == "__main__":
    main()
