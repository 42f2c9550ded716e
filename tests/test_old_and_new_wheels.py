"""Wheels of two releases side by side: installed within the bounds, refused outside.

The bounds between members are what keeps an old contract away from new code, and the installer is
who enforces them. Both directions: the release before this tree, out of the history of git, and the
one after it, with a version number that is made up.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
import tomllib
from pathlib import Path

import pytest
from check_wheels import build_packages, install_wheels
from packaging.version import Version
from workspace import ROOT, Member, members_needed_by, read_members

pytestmark = pytest.mark.slow

MEMBERS = read_members()
DEPENDENT = MEMBERS["distill-trainer"]
CONTRACTS = MEMBERS["distill-protocols"]


def git(*arguments: str) -> str:
    result = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        pytest.skip(f"no history to look into: {result.stderr.strip()}")
    return result.stdout.strip()


def previous_release(member: Member) -> str:
    """Find the tag of the last version before this one, or else the last commit that had it."""
    path = f"{member.folder.relative_to(ROOT)}/pyproject.toml"
    after = "HEAD"
    for commit in git("log", "--format=%H", "--", path).split():
        project = tomllib.loads(git("show", f"{commit}:{path}"))["project"]
        if project["version"] != member.version:
            return git("tag", "--list", f"{member.name}-v{project['version']}") or after
        after = f"{commit}^"
    pytest.skip(f"no newer release than {member.name} {member.version}")


def build(root: Path, out: Path) -> dict[str, Path]:
    """Build the workspace at ``root``: member -> wheel."""
    build_packages(root, out)
    return {wheel.name.split("-")[0].replace("_", "-"): wheel for wheel in out.glob("*.whl")}


def copy_tree(folder: Path) -> Path:
    """Copy what a build reads of this tree."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    for member in MEMBERS.values():
        shutil.copytree(member.folder, folder / member.folder.relative_to(ROOT))
    return folder


@pytest.fixture(scope="module")
def new_wheels(tmp_path_factory) -> dict[str, Path]:
    return build(ROOT, tmp_path_factory.mktemp("new"))


@pytest.fixture(scope="module")
def old_wheels(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("old")
    archive = subprocess.check_output(["git", "archive", previous_release(CONTRACTS)], cwd=ROOT)
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder / "tree", filter="data")
    return build(folder / "tree", folder / "dist")


def install(venv: Path, wheels: list[Path]) -> subprocess.CompletedProcess[str]:
    """Ask the resolver whether ``wheels`` go together, without unpacking them."""
    subprocess.run(["uv", "venv", "--quiet", str(venv)], check=True)
    command = ["uv", "pip", "install", "--dry-run", "--python", str(venv / "bin" / "python")]
    command += map(str, wheels)
    return subprocess.run(command, capture_output=True, text=True, check=False)


def needed_wheels(wheels: dict[str, Path]) -> dict[str, Path]:
    """Pick the trainer and the members that it needs."""
    names = members_needed_by(DEPENDENT.name, MEMBERS)
    return {name: wheels[name] for name in names}


def assert_refused(result: subprocess.CompletedProcess[str]) -> None:
    """Check that the refusal names a member, its version, and the bounds that do not fit."""
    message = " ".join(result.stderr.split())
    assert result.returncode != 0
    assert "your requirements are unsatisfiable" in message
    needs = {
        f"{member.name}=={member.version} depends on {CONTRACTS.name}>={lower.version}"
        for member in MEMBERS.values()
        if CONTRACTS.name in member.requirements
        for lower in member.requirements[CONTRACTS.name].specifier
        if lower.operator == ">="
    }
    assert any(need in message for need in needs), result.stderr


def test_the_wheels_of_this_tree_install(new_wheels, tmp_path):
    install_wheels(tmp_path / "venv", list(new_wheels.values()))


def test_the_previous_contracts_beside_the_new_trainer(new_wheels, old_wheels, tmp_path):
    old = old_wheels[CONTRACTS.name]
    version = old.name.split("-")[1]
    result = install(tmp_path, list((needed_wheels(new_wheels) | {CONTRACTS.name: old}).values()))
    if Version(version) in DEPENDENT.requirements[CONTRACTS.name].specifier:
        assert result.returncode == 0, result.stderr
    else:
        assert_refused(result)


def test_the_wheels_of_the_previous_release_still_install(old_wheels, tmp_path):
    result = install(tmp_path, list(old_wheels.values()))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("bump", ["minor", "major"])
def test_the_next_contracts_beside_this_trainer(new_wheels, tmp_path, bump):
    version = Version(CONTRACTS.version)
    later = {"minor": f"{version.major}.{version.minor + 1}.0", "major": f"{version.major + 1}.0.0"}
    tree = copy_tree(tmp_path)
    project = tree / CONTRACTS.folder.relative_to(ROOT) / "pyproject.toml"
    text = project.read_text()
    project.write_text(text.replace(f'version = "{version}"', f'version = "{later[bump]}"', 1))
    wheels = needed_wheels(new_wheels)
    wheels[CONTRACTS.name] = build(tree, tmp_path / "dist")[CONTRACTS.name]
    result = install(tmp_path / "venv", list(wheels.values()))
    if bump == "minor":
        assert result.returncode == 0, result.stderr
    else:
        assert_refused(result)
