"""Tiny SD 3 pipelines, and the example family as somebody would install it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sd3_pipelines
from workspace import ROOT

PACKAGE = ROOT / "examples" / "family-sd3"


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Return the folder of a version, built on first use."""
    root, built = tmp_path_factory.mktemp("sd3"), {}

    def folder(version: str = "3-medium") -> Path:
        if version not in built:
            built[version] = sd3_pipelines.build(root / version, version)
        return built[version]

    return folder


@pytest.fixture(scope="session")
def stock(folders):
    """Return the stock pipeline of a version, loaded on first use."""
    from diffusers import StableDiffusion3Pipeline

    loaded = {}

    def pipeline(version: str = "3-medium"):
        if version not in loaded:
            absent = {} if sd3_pipelines.VERSIONS[version].t5 else dict.fromkeys(WITHOUT_T5)
            loaded[version] = StableDiffusion3Pipeline.from_pretrained(folders(version), **absent)
            loaded[version].set_progress_bar_config(disable=True)
        return loaded[version]

    return pipeline


WITHOUT_T5 = ("text_encoder_3", "tokenizer_3")
"""Components that from_pretrained wants to be told are None, though the folder's index says so."""


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
    """The installed package's modules; afterwards it is as if it had never been there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(installed))
        names = ("config", "models", "text", "plugin", "adapter", "export")
        modules = {name: importlib.import_module(f"distill_family_sd3.{name}") for name in names}
        yield SimpleNamespace(**modules)
    for name in [name for name in sys.modules if name.startswith("distill_family_sd3")]:
        del sys.modules[name]
