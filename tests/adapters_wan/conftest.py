"""A complete Wan pipeline folder of 60,000 parameters, random and seeded, built once a session."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
import wan_variants
from distill_adapters_wan import PLUGIN, WanPipelineConfig
from distill_protocols import RoleSpec

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pipeline_template(tmp_path_factory):
    return wan_variants.template(tmp_path_factory.mktemp("wan") / "pipeline")


@pytest.fixture
def pipeline(pipeline_template, tmp_path):
    """Copy the pipeline, so that a test may damage it."""
    return Path(shutil.copytree(pipeline_template, tmp_path / "pipeline"))


@pytest.fixture(scope="session")
def config():
    return WanPipelineConfig(num_frames=5, height=32, width=48, max_sequence_length=6)


@pytest.fixture(scope="session")
def make_adapter(pipeline_template, config):
    """(adapter, bundle) with one role a keyword: name=(trainable, precision)."""

    def make(*, config=config, source=None, **roles):
        source = str(source or pipeline_template)
        specs = [
            RoleSpec(name=name, path=source, trainable=trainable, precision=precision)
            for name, (trainable, precision) in roles.items()
        ]
        bundle = PLUGIN.load(specs, config, device=torch.device("cpu"))
        return PLUGIN.adapter(bundle, config, source=source), bundle

    return make


@pytest.fixture(scope="session")
def adapter(make_adapter):
    """Role ``teacher``, frozen, fp32."""
    return make_adapter(teacher=(False, "fp32"))[0]


@pytest.fixture
def count_calls():
    """Return a context that records the batch size of every call of the role ``teacher``."""

    @contextlib.contextmanager
    def counting(adapter):
        calls = []
        transformer = adapter._bundle["teacher"].modules["transformer"]
        hook = transformer.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(len(kwargs["hidden_states"])),
            with_kwargs=True,
        )
        yield calls
        hook.remove()

    return counting


@pytest.fixture(scope="session")
def folder_of(pipeline_template, tmp_path_factory):
    """Name of a variant -> its folder, which no test may change."""
    base, folders = tmp_path_factory.mktemp("variants"), {}

    def folder(name):
        if name not in folders:
            folders[name] = wan_variants.build(name, pipeline_template, base / name)
        return str(folders[name])

    return folder
