"""Stock pipelines of the tiny LTX folders."""

from __future__ import annotations

import ltx_pipelines
import pytest
import torch
from diffusers import LTXConditionPipeline, LTXPipeline
from family_fixtures import ltx_folder as folder_of

__all__ = ["folder_of", "stock"]

torch.set_num_threads(1)

PIPELINES = {kind.__name__: kind for kind in (LTXPipeline, LTXConditionPipeline)}


def unmap(pipeline):
    """Copy weights out of the mapped files, where a matrix product may round otherwise by where
    numbers lie."""
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()


@pytest.fixture(scope="session")
def stock(folder_of):
    """Version -> its stock pipeline, loaded anew: a call leaves traces in its scheduler."""

    def load(version="0.9.0"):
        kind = PIPELINES[ltx_pipelines.VERSIONS[version].pipeline]
        pipeline = kind.from_pretrained(folder_of(version))
        unmap(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load
