"""A Wan that lies in parts on two ranks is exported as one that lies on one."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import torch
from distill_adapters_wan import PLUGIN
from distill_checkpoint import gather_on_rank0, new_checkpoint_group
from distill_protocols import ExportRequest, ModelBundle, RoleSpec, SamplerSpec
from ranks import run_on_ranks, shard

REQUESTS = {
    "pipeline": ExportRequest(sampler=SamplerSpec(steps=1), max_shard_bytes=40_000),
    "comfy": ExportRequest(sampler=SamplerSpec(steps=1), format="comfyui", precision="bf16"),
}


def loaded(config, path: str) -> tuple[RoleSpec, ModelBundle]:
    role = RoleSpec(name="student", path=path, trainable=True)
    return role, PLUGIN.load([role], config, device=torch.device("cpu"))


def export(config, path: str, folder: Path) -> None:
    role, bundle = loaded(config, path)
    shard(bundle["student"].modules["transformer"], "fsdp2")
    exporter = PLUGIN.exporter(config, source=path)
    for name, request in REQUESTS.items():
        weights = bundle["student"].weight_sources()

        def write(sources, name=name, request=request) -> None:
            exporter.export(role, sources, folder / name, request)
            exporter.verify(role, sources, folder / name, request)

        gather_on_rank0(new_checkpoint_group(60.0), weights, write)


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_two_ranks_write_what_one_does_byte_for_byte(config, pipeline_template, tmp_path):
    path = str(pipeline_template)
    fork = multiprocessing.get_context("fork")  # diffusers is here already
    assert run_on_ranks(export, config, path, tmp_path / "two", context=fork) == [None, None]
    role, bundle = loaded(config, path)
    for name, request in REQUESTS.items():
        weights = bundle["student"].weight_sources()
        PLUGIN.exporter(config, source=path).export(role, weights, tmp_path / "one" / name, request)
    actual, expected = files(tmp_path / "two"), files(tmp_path / "one")
    assert actual.keys() == expected.keys()
    assert len(actual) > 10
    assert [name for name, content in actual.items() if content != expected[name]] == []
