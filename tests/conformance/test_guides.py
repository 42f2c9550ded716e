"""The guides in docs/extend work: their files make packages that pass the suites."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_protocols import Samples
from distill_runtime import load_plugin
from distill_trainer import DistillTrainer
from toy_trainer import alternating, batches, training

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ROOT / "docs" / "extend"

STAND_IN = """
from distill_conformance.toy import ToyAdapter, ToyConfig, ToyFamily
from distill_protocols import ContractError

FAMILY = ToyFamily()


class MineAdapter(ToyAdapter):
    def forward(self, role, x_t, t, cond, **options):
        if t.dim() != 1 or options.get("features") is not None:
            raise ContractError("one time a sample, and no features")
        return super().forward(role, x_t, t, cond, **options)


def plan_role(role):
    return FAMILY.plan(role, ToyConfig())


def load_bundle(roles, **options):
    return FAMILY.load(roles, ToyConfig(), **options)


def fingerprint_of(source):
    return FAMILY.fingerprint(ToyConfig(), source=source)


def folder_weights(path):
    return FAMILY.weights(path)
"""


def write_package(guide: str, folder: Path) -> Path:
    """Write each file that the guide shows, and what an installer would make of its metadata."""
    text = (GUIDES / guide).read_text()
    files = dict(re.findall(r"^`(\S+)`\n\n```\w+\n(.*?)```$", text, re.DOTALL | re.MULTILINE))
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    project = tomllib.loads(files["pyproject.toml"])["project"]
    name, version = project["name"], project["version"]
    info = folder / "src" / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")
    groups = [
        "\n".join([f"[{group}]", *(f"{key} = {target}" for key, target in entries.items())])
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups))
    return folder


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Write a guide's package and make it importable, also for processes of its tests."""
    before = set(sys.modules)

    def write(guide: str) -> Path:
        folder = write_package(guide, tmp_path)
        monkeypatch.syspath_prepend(str(folder / "src"))
        monkeypatch.setenv("PYTHONPATH", str(folder / "src"))
        return folder

    yield write
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


class Outcomes:
    """How many tests passed, were skipped or failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.passed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed
        if report.failed:
            self.failed.append(f"{report.nodeid}: {report.longreprtext[-600:]}")


def run_suite(folder: Path) -> Outcomes:
    """Run the package's own test file as its author would."""
    outcomes = Outcomes()
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    file = folder / "tests" / "test_conformance.py"
    arguments = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:terminal"]
    pytest.main([*arguments, "-c", str(folder / "pytest.ini"), str(file)], plugins=[outcomes])
    return outcomes


def test_the_method_of_the_guide_passes_the_suite(install):
    folder = install("method.md")
    assert load_plugin("distill.methods", "match").config_class.__name__ == "MatchConfig"
    outcomes = run_suite(folder)
    assert outcomes.failed == []
    assert outcomes.passed >= 30
    lines = [
        line
        for file in (folder / "src" / "distill_match").glob("*.py")
        for line in file.read_text().splitlines()
        if line.strip()
    ]
    assert len(lines) < 150


def test_the_run_file_of_the_method_guide_is_valid(install):
    from distill_runfile import read_config

    file = install("method.md") / "match.yaml"
    for name in ("wan", "data"):
        (file.parent / name).symlink_to(ROOT / "configs" / "tiny" / name)
    read_config(file, planning=True)  # raises ConfigError with all problems


def test_the_family_of_the_guide_passes_the_suite(install):
    folder = install("family.md")
    (folder / "src" / "distill_adapters_mine" / "adapter.py").write_text(STAND_IN)
    assert load_plugin("distill.families", "mine").name == "mine"
    outcomes = run_suite(folder)
    assert outcomes.failed == []
    assert outcomes.passed >= 35


def test_the_metric_of_the_guide_measures_flicker(install):
    install("metric.md")
    plugin = load_plugin("distill.metrics", "flicker")
    parts: Any = None
    metric = plugin.build(plugin.config_class(least=0.1), parts)
    clips = torch.zeros(2, 3, 3, 5, 8, 8)
    clips[1, :, :, 2] = 0.2  # one frame of five lights up: two of four changes, in half the clips
    samples = Samples(prompts=("a", "b"), rows=(0, 1), clips=clips, latents=clips)
    assert metric.combine(metric.measure(samples)) == {"flicker": 0.25}
    assert list(plugin.numbers(plugin.config_class(), parts)) == ["flicker"]


def test_the_callback_of_the_guide_stops_a_run(install, tmp_path):
    install("README.md")
    plugin = load_plugin("distill.callbacks", "time_limit")
    callback = plugin.build(plugin.config_class(hours=1e-9), parts=None)
    config = training(tmp_path / "run", 5, trackers=("jsonl",), log_every=1)
    result = DistillTrainer(config, callbacks=[callback]).run(alternating(), batches())
    assert (result.iteration, result.stop_reason) == (1, "1e-09 hours are over")
    numbers = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "time/left" in numbers


def test_the_tracker_of_the_guide_gets_every_number_once(install, tmp_path):
    install("tracker.md")
    config = training(tmp_path / "run", 2, trackers=("spreadsheet",), log_every=1)
    DistillTrainer(config).run(alternating(), batches())
    table = tmp_path / "run" / "numbers.csv"
    rows = [line.split(",") for line in table.read_text().splitlines()]
    losses = [row[0] for row in rows if row[1] == "loss/total_loss"]
    assert losses == ["1", "2"]
    tracker = load_plugin("distill.trackers", "spreadsheet").build(tmp_path / "run")
    tracker.resume(1)
    assert {line.split(",")[0] for line in table.read_text().splitlines()} == {"1"}


def test_the_readme_of_the_suites_shows_what_exists():
    readme = (ROOT / "packages" / "distill-conformance" / "README.md").read_text()
    scope: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        exec(compile(block, "README.md", "exec"), scope)
    assert {"TestToyFamily", "TestDMD2", "TestMine"} <= scope.keys()


@pytest.mark.parametrize("guide", ["method.md", "family.md"])
def test_the_tables_name_what_exists(guide):
    """Every ``test_...`` in a guide is one of a suite."""
    from distill_conformance import AdapterSuite, MethodSuite

    known = {*vars(AdapterSuite), *vars(MethodSuite), "test_conformance"}
    named = set(re.findall(r"\btest_\w+", (GUIDES / guide).read_text()))
    assert named <= known
