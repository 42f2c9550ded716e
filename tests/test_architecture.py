"""Rules that a review would check by eye: who imports whom, and what each package declares."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MEMBERS = sorted(p.parent for p in ROOT.glob("*/*/pyproject.toml"))
BIN = Path(sys.executable).parent

MAY_NOT_IMPORT = ("diffusers", "transformers", "accelerate", "peft")
LIGHT = (
    "distill_protocols",
    "distill_runtime",
    "distill_trainer",
    "distill_trainer.config",
    "distill_trainer.plugins",
    "distill_checkpoint.config",
    "distill_conditioning.config",
    "distill_media",
    "distill_media.config",
    "distill_methods.plugins",
    "distill_adapters_wan.names.fastvideo",
    "distill_adapters_wan.plugin",
    "distill_evaluation.page",
    "distill_evaluation.page.plugin",
    "distill_evaluation.plugins",
    "distill_runfile.cli",
    "distill_runfile.read",
    "distill_train.cli",
    "distill_export.cli",
    "distill_migrate.cli",
    "distill_preprocess.cli",
    "distill_report.cli",
    "distill_sample.cli",
    "distill_trajectories.cli",
)


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_imports_go_one_way():
    result = run(str(BIN / "lint-imports"))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("member", MEMBERS, ids=lambda p: p.name)
def test_a_package_declares_just_what_it_imports(member: Path):
    module = next((member / "src").iterdir()).name
    result = run(str(BIN / "deptry"), "src", "--known-first-party", module, cwd=member)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("member", MEMBERS, ids=lambda p: p.name)
def test_members_have_a_readme_a_changelog_and_types(member: Path):
    project = tomllib.loads((member / "pyproject.toml").read_text())["project"]
    assert (member / "README.md").read_text().startswith(f"# {project['name']}")
    assert project["version"] in (member / "CHANGELOG.md").read_text()
    assert next(member.glob("src/*/py.typed"), None) is not None


def test_light_modules_import_no_torch():
    code = (
        f"import importlib, sys\nfor name in {LIGHT!r}: importlib.import_module(name)\n"
        "from distill_runtime import load_plugin, plugin_names\n"
        "for group in ('distill.families', 'distill.methods', 'distill.callbacks'):\n"
        "    for name in plugin_names(group): load_plugin(group, name)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr


def test_the_shipped_tiny_files_stay_small():
    size = sum(f.stat().st_size for f in (ROOT / "configs" / "tiny").rglob("*") if f.is_file())
    assert size <= 25e6


def test_lock_and_members_agree():
    result = run("uv", "lock", "--check", "--offline")
    assert result.returncode == 0, result.stderr
    result = run("uv", "pip", "check", "--python", sys.executable)
    assert result.returncode == 0, result.stderr
