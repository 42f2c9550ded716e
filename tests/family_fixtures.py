"""Fixtures of families beside Wan, which test modules and conftests import: tiny folders of LTX,
HunyuanVideo, Qwen-Image, Z-Image and SD 3, and the example package of SD 3 as somebody would
install it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import hunyuan_pipelines
import longcat_pipelines
import ltx2_pipelines
import ltx_pipelines
import pytest
import qwen_image_pipelines
import sd3_pipelines
import z_image_pipelines
from workspace import ROOT

PACKAGE = ROOT / "examples" / "family-sd3"


@pytest.fixture(scope="session")
def ltx_folder(tmp_path_factory):
    """Return the pipeline folder of a version, built on first use; no test may change it."""
    base, built = tmp_path_factory.mktemp("ltx"), {}

    def folder(version: str = "0.9.1") -> Path:
        if version not in built:
            built[version] = ltx_pipelines.build(base / version, version)
        return built[version]

    return folder


@pytest.fixture(scope="session")
def hunyuan_folder(tmp_path_factory):
    """Return the pipeline folder of HunyuanVideo ("video") or of a version of 1.5, built on first
    use; no test may change it."""
    base, built = tmp_path_factory.mktemp("hunyuan"), {}

    def folder(version: str) -> Path:
        if version not in built:
            if version == "video":
                built[version] = hunyuan_pipelines.build(base / version)
            else:
                built[version] = hunyuan_pipelines.build15(base / version, version)
        return built[version]

    return folder


@pytest.fixture(scope="session")
def ltx2_folder(tmp_path_factory):
    """Return the pipeline folder of a version of LTX-2, built on first use; no test may change
    it."""
    base, built = tmp_path_factory.mktemp("ltx2"), {}

    def folder(version: str) -> Path:
        if version not in built:
            built[version] = ltx2_pipelines.build(base / version, version)
        return built[version]

    return folder


@pytest.fixture(scope="session")
def longcat_folder(tmp_path_factory) -> Path:
    """Return a folder of LongCat-Video; no test may change it."""
    return longcat_pipelines.build(tmp_path_factory.mktemp("longcat") / "model")


@pytest.fixture(scope="session")
def qwen_image_folder(tmp_path_factory) -> Path:
    """Return a pipeline folder, which no test may change."""
    return qwen_image_pipelines.build(tmp_path_factory.mktemp("qwen-image") / "pipeline")


@pytest.fixture(scope="session")
def z_image_folder(tmp_path_factory) -> Path:
    """Return a pipeline folder, which no test may change."""
    return z_image_pipelines.build(tmp_path_factory.mktemp("z-image") / "pipeline")


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory):
    """Return the pipeline folder of a version, built on first use; no test may change it."""
    root, built = tmp_path_factory.mktemp("sd3"), {}

    def folder(version: str = "3-medium") -> Path:
        if version not in built:
            built[version] = sd3_pipelines.build(root / version, version)
        return built[version]

    return folder


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Path:
    """Build the example's wheel and install it into a folder, beside nothing else."""
    root = tmp_path_factory.mktemp("example")
    for command in (
        ["build", "--wheel", "--out-dir", str(root / "dist"), str(PACKAGE)],
        ["pip", "install", "--no-deps", "--target", str(root / "site"), "--find-links",
         str(root / "dist"), "distill-family-sd3"],
    ):  # fmt: skip
        result = subprocess.run(
            ["uv", "--quiet", "--offline", *command], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
    return root / "site"


@pytest.fixture(scope="module")
def sd3(installed):
    """Install the example package for the test, and remove its modules afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(installed))
        names = ("config", "models", "text", "plugin", "adapter", "export")
        modules = {name: importlib.import_module(f"distill_family_sd3.{name}") for name in names}
        yield SimpleNamespace(**modules)
    for name in [name for name in sys.modules if name.startswith("distill_family_sd3")]:
        del sys.modules[name]
