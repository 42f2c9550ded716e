"""`tools/release.py` on a workspace of two packages that is thrown away."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from release import add_entry, main, replace_bounds
from workspace import ROOT

TODAY = datetime.date.today().isoformat()
WORKSPACE = """
[project]
name = "tiny-workspace"
version = "0"
requires-python = ">=3.11"

[tool.uv]
package = false

[tool.uv.workspace]
members = ["packages/*"]

[tool.uv.sources]
tiny-protocols = { workspace = true }
"""
MEMBER = """
[project]
name = "{name}"
version = "1.0.0"
description = "A package."
readme = "README.md"
license = "Apache-2.0"
license-files = ["LICENSE"]
requires-python = ">=3.11"
classifiers = ["Typing :: Typed"]
dependencies = [{needs}]

[build-system]
requires = ["uv_build>=0.8,<1"]
build-backend = "uv_build"
"""
UNRELEASED = (
    "# Changelog\n\n## Unreleased\n\n- `call` takes a name.\n\n## 1.0.0\n\nFirst release.\n"
)


def git(root: Path, *arguments: str) -> str:
    return subprocess.check_output(["git", *arguments], cwd=root, text=True).strip()


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Commit a workspace: tiny-trainer needs tiny-protocols, which has something to release."""
    for name in (
        "GIT_AUTHOR_NAME",
        "GIT_COMMITTER_NAME",
        "GIT_AUTHOR_EMAIL",
        "GIT_COMMITTER_EMAIL",
    ):
        monkeypatch.setenv(name, "nobody@example.org")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("UV_OFFLINE", "1")
    root = tmp_path / "tiny"
    for name, needs in (("tiny-protocols", ""), ("tiny-trainer", '"tiny-protocols>=1.0,<2"')):
        folder = root / "packages" / name
        source = folder / "src" / name.replace("-", "_")
        source.mkdir(parents=True)
        (source / "__init__.py").touch()
        (source / "py.typed").touch()
        (folder / "pyproject.toml").write_text(MEMBER.format(name=name, needs=needs))
        (folder / "README.md").write_text(f"# {name}\n")
        (folder / "CHANGELOG.md").write_text("# Changelog\n\n## 1.0.0\n\nFirst release.\n")
        shutil.copy(ROOT / "LICENSE", folder)
    (root / "packages" / "tiny-protocols" / "CHANGELOG.md").write_text(UNRELEASED)
    (root / "pyproject.toml").write_text(WORKSPACE)
    subprocess.run(["uv", "lock", "--quiet"], cwd=root, check=True)
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "Start")
    return root


def project(root: Path, name: str) -> dict:
    return tomllib.loads((root / "packages" / name / "pyproject.toml").read_text())["project"]


def changelog(root: Path, name: str) -> str:
    return (root / "packages" / name / "CHANGELOG.md").read_text()


@pytest.fixture
def unchecked(monkeypatch):
    """Leave out the build and the installation."""
    monkeypatch.setattr("release.check_packages", lambda root, name: None)


def test_a_dry_run_prints_the_changes_and_makes_none(root, capsys):
    main(["tiny-protocols", "--bump", "major", "--dry-run"], root)
    output = capsys.readouterr().out
    assert output.startswith("tiny-protocols 1.0.0 -> 2.0.0\n")
    assert f"+## 2.0.0 ({TODAY})" in output
    assert '-dependencies = ["tiny-protocols>=1.0,<2"]' in output
    assert '+dependencies = ["tiny-protocols>=2.0,<3"]' in output
    assert output.endswith("The tag would be tiny-protocols-v2.0.0\n")
    assert git(root, "status", "--porcelain") == ""


@pytest.mark.usefixtures("unchecked")
def test_a_minor_release_leaves_the_bounds_alone(root, capsys):
    main(["tiny-protocols", "--bump", "minor"], root)
    assert project(root, "tiny-protocols")["version"] == "1.1.0"
    assert project(root, "tiny-trainer")["dependencies"] == ["tiny-protocols>=1.0,<2"]
    assert changelog(root, "tiny-protocols") == (
        f"# Changelog\n\n## Unreleased\n\n## 1.1.0 ({TODAY})\n\n- `call` takes a name.\n\n"
        "## 1.0.0\n\nFirst release.\n"
    )
    assert 'name = "tiny-protocols"\nversion = "1.1.0"' in (root / "uv.lock").read_text()
    assert capsys.readouterr().out.endswith("create the tag tiny-protocols-v1.1.0\n")
    assert git(root, "tag") == ""


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("bump", "bounds"),
    [("minor", ">=1.1,<2"), ("patch", ">=1.0.1,<2"), ("major", ">=2.0,<3")],
)
def test_bounds_that_rise_are_a_change_of_the_dependent(root, capsys, bump, bounds):
    main(["tiny-protocols", "--bump", bump, "--raise-lower"], root)
    assert project(root, "tiny-trainer")["dependencies"] == [f"tiny-protocols{bounds}"]
    assert project(root, "tiny-trainer")["version"] == "1.0.0"
    assert f"## Unreleased\n\n- Needs `tiny-protocols{bounds}`.\n\n## 1.0.0" in changelog(
        root, "tiny-trainer"
    )
    assert "as their bounds changed: tiny-trainer" in capsys.readouterr().out


@pytest.mark.usefixtures("unchecked")
def test_tags_are_made_on_request_and_each_of_a_clean_commit(root):
    main(["tiny-protocols", "--bump", "major", "--tag"], root)
    main(["tiny-trainer", "--bump", "minor", "--tag"], root)
    assert git(root, "tag").split() == ["tiny-protocols-v2.0.0", "tiny-trainer-v1.1.0"]
    assert git(root, "status", "--porcelain") == ""
    assert git(root, "log", "-1", "--format=%s") == "Release tiny-trainer-v1.1.0"


def test_the_wheels_of_a_release_are_built_and_installed(root, capfd):
    main(["tiny-protocols", "--bump", "major", "--tag"], root)
    output = capfd.readouterr()
    assert "All installed packages are compatible" in output.out + output.err
    assert git(root, "tag") == "tiny-protocols-v2.0.0"


def test_a_release_that_does_not_install_is_rolled_back(root, capfd):
    trainer = root / "packages" / "tiny-trainer" / "pyproject.toml"
    trainer.write_text(trainer.read_text().replace(">=1.0,<2", ">=1.0,<1.1"))
    git(root, "commit", "--quiet", "-am", "A bound too narrow for the next version")
    with pytest.raises(SystemExit, match="`uv pip install` failed"):
        main(["tiny-protocols", "--bump", "minor", "--tag"], root)
    output = capfd.readouterr()
    assert "tiny-protocols>=1.0,<1.1" in output.err
    assert "The tree is as it was before" in output.out
    assert git(root, "status", "--porcelain") == git(root, "tag") == ""


def test_a_wheel_without_types_is_not_released(root):
    git(root, "rm", "--quiet", "packages/tiny-protocols/src/tiny_protocols/py.typed")
    git(root, "commit", "--quiet", "-m", "Lose the types")
    with pytest.raises(SystemExit, match=r"no tiny_protocols/py\.typed"):
        main(["tiny-protocols", "--bump", "minor"], root)
    assert git(root, "status", "--porcelain") == ""


def test_all_reasons_against_a_release_are_reported_at_once(root):
    git(root, "tag", "tiny-trainer-v1.0.1")
    (root / "notes.txt").touch()
    with pytest.raises(SystemExit) as refusal:
        main(["tiny-trainer", "--bump", "patch"], root)
    text = str(refusal.value)
    assert "not committed:\n?? notes.txt" in text
    assert "tiny-trainer/CHANGELOG.md has nothing under `## Unreleased`" in text
    assert "The tag tiny-trainer-v1.0.1 exists already" in text


def test_a_package_that_is_not_there_is_refused_with_a_suggestion(root):
    with pytest.raises(SystemExit, match="Did you mean tiny-trainer"):
        main(["tiny-trainr", "--bump", "patch"], root)
    with pytest.raises(SystemExit, match="There are tiny-protocols, tiny-trainer"):
        main(["numpy", "--bump", "patch"], root)


def test_bounds_are_replaced_wherever_the_package_is_required():
    text = (
        'dependencies = ["one>=1.0,<2", "one-more>=1.0,<2", "one[fast] >=1.0,<2 ; extra"]\n'
        'DEP002 = ["one"]\n'
    )
    assert replace_bounds(text, "one", ">=2.0,<3") == (
        'dependencies = ["one>=2.0,<3", "one-more>=1.0,<2", "one[fast]>=2.0,<3; extra"]\n'
        'DEP002 = ["one"]\n'
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("# Changelog\n", "# Changelog\n## Unreleased\n\n- New.\n"),
        ("# C\n\n## 1.0.0\n\nFirst.\n", "# C\n\n## Unreleased\n\n- New.\n\n## 1.0.0\n\nFirst.\n"),
        ("## Unreleased\n\n- Old,\n  long.\n", "## Unreleased\n\n- Old,\n  long.\n- New.\n"),
        ("## Unreleased\n\nOld\ntext.\n", "## Unreleased\n\nOld\ntext.\n\n- New.\n"),
    ],
)
def test_entries_join_what_is_unreleased(before, after):
    assert add_entry(before, "New.") == after
