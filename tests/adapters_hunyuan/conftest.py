"""Tiny folders of both families, and their stock pipelines."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from family_cases import copy_out_of_mapped_files
from family_fixtures import hunyuan_folder

__all__ = ["hunyuan_folder", "stock"]

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def stock(hunyuan_folder):
    """Return the stock pipeline of a version, loaded anew: a call leaves traces in its
    scheduler."""

    def load(version: str) -> Any:
        pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(hunyuan_folder(version))
        copy_out_of_mapped_files(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load
