"""Tiny LTX pipelines of each published kind, built once a session."""

from __future__ import annotations

import ltx_pipelines
import pytest
import torch
from diffusers import LTXConditionPipeline, LTXPipeline

torch.set_num_threads(1)

PIPELINES = {kind.__name__: kind for kind in (LTXPipeline, LTXConditionPipeline)}


def unmap(pipeline):
    """Copy weights out of the mapped files, where a matrix product may round otherwise by where
    numbers lie."""
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """Version -> its pipeline folder, which no test may change."""
    base, built = tmp_path_factory.mktemp("ltx"), {}

    def folder(version):
        if version not in built:
            built[version] = ltx_pipelines.build(base / version, version)
        return built[version]

    return folder


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
