"""Tiny pipeline folders of model classes that no package here has a family for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from other_kinds import LTX_CONFIG


@pytest.fixture(scope="session")
def ltx_folder(tmp_path_factory) -> Path:
    """Write an index and a transformer of seeded random weights."""
    folder = tmp_path_factory.mktemp("ltx") / "pipeline"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LTXVideoTransformer3DModel(**LTX_CONFIG).save_pretrained(folder / "transformer")
    index = {"transformer": ["diffusers", "LTXVideoTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
