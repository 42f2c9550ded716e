"""A complete Wan pipeline folder of 60,000 parameters, random and seeded, built once a session."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
import wan_variants
from distill_adapters_wan import PLUGIN, WanAdapter, WanPipelineConfig
from distill_conditioning import ShardWriter, preprocess
from distill_protocols import ModelBundle, RoleSpec
from wan_variants import VARIANTS

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


def clips(count=4):
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        yield f"clip-{i}", "a seven moving left", torch.rand(3, 9, 32, 48, generator=generator)


@pytest.fixture
def values(folder_of, tmp_path):
    """Name of a variant -> a run file's values, its data set made."""

    def values(name, method="finetune"):
        variant, path = VARIANTS[name], folder_of(name)
        adapter = WanAdapter(ModelBundle({}), PLUGIN, variant.config, source=path)
        with ShardWriter(tmp_path / "data") as writer:
            preprocess(
                clips(), adapter, writer, negative_prompt="", first_frames=variant.image,
                last_frame=variant.pair,
            )  # fmt: skip
        roles = {"student": {"path": path}}
        options = {"student_sampler": {"steps": 2, "guidance": 1.0}}
        if method == "dmd2":
            roles |= {"teacher": {"path": path}, "critic": {"path": path}}
            options |= {"generator_update_interval": 2, "real_score_guidance_scale": 2.0}
        return {
            "recipe": {"family": "wan", "method": method},
            "models": roles,
            "training": {
                "output_dir": str(tmp_path / "out"), "max_train_steps": 4, "global_batch_size": 2,
                "optimizer": {"lr": 1e-3},
            },
            "data": {"path": str(tmp_path / "data")},
            "pipeline_config": {
                "num_frames": 9, "height": 32, "width": 48,
                "max_sequence_length": variant.config.max_sequence_length,
            },
            "method_config": options,
            "checkpoint": {"export": [{"role": "student", "folder": "student"}]},
            "validation": {
                "prompts": ["a seven moving left", "a seven moving left"],
                "views": {"student": {"role": "student"}},
            },
        }  # fmt: skip

    return values
