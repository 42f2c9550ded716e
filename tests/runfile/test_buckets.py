"""Runs on clips of several sizes, and on captions alone: checked, planned and trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_adapters_wan.adapter import WanAdapter
from distill_conditioning import LatentLoader, ShardWriter
from distill_protocols import Condition, ConfigError
from distill_runfile import read_config
from distill_runfile.plan import _data
from distill_train.cli import EXIT_OK, main
from slow_cases import slow_but

LARGEST, WIDE, PICTURE = (8, 3, 4, 4), (8, 2, 2, 6), (8, 1, 4, 6)
BUCKETS = [
    {"num_frames": 5, "height": 16, "width": 48},
    {"num_frames": 9, "height": 32, "width": 32},
    {"height": 32, "width": 48},
]


def write_data(folder: Path, *shapes: tuple[int, int, int, int] | None, count: int = 6) -> str:
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder) as writer:
        writer.set_negative("", Condition({"text": torch.zeros(1, 8, 64)}))
        for number, shape in enumerate(shapes):
            ids = [f"{number}-{i}" for i in range(count)]
            latents = None
            if shape is not None:
                latents = torch.randn(count, *shape, generator=generator)
            text = torch.randn(count, 8, 64, generator=generator)
            writer.add(ids, ids, latents, Condition({"text": text}))
    return str(folder)


@pytest.fixture
def bucketed(values) -> dict[str, Any]:
    values["pipeline_config"] = {"buckets": BUCKETS, "max_sequence_length": 8}
    values["training"] |= {"log_every": 1}
    values["checkpoint"] = {"resume": "latest"}
    return values


def use(values: dict[str, Any], method: str, **config: object) -> None:
    """Train by another method than dmd2."""
    values["recipe"]["method"] = method
    values["method_config"] = config
    if method == "finetune":
        values["models"] = {"student": values["models"]["student"]}


def problems(file: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_config(file)
    return str(caught.value).splitlines()


@pytest.fixture
def seen(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the clips of the batches that were read."""
    shapes: list[tuple[int, ...]] = []
    read = LatentLoader._read

    def watch(self, choice):
        batch = read(self, choice)
        shapes.append(batch.latent_shape)
        return batch

    monkeypatch.setattr(LatentLoader, "_read", watch)
    return shapes


@pytest.fixture
def made(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the clips that the student made."""
    shapes: list[tuple[int, ...]] = []
    rollout = WanAdapter.rollout

    def watch(self, role, spec, noise, cond, **options):
        shapes.append(tuple(noise.shape[1:]))
        return rollout(self, role, spec, noise, cond, **options)

    monkeypatch.setattr(WanAdapter, "rollout", watch)
    return shapes


def train(values: dict[str, Any], write, out: Path, *, steps: int = 6) -> list[float]:
    """Train, and return the losses of all iterations."""
    values["training"] |= {"max_train_steps": steps, "output_dir": str(out)}
    assert main(["--config", str(write(values))]) == EXIT_OK
    lines = (out / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    losses = [line["loss/total_loss"] for line in logged if "loss/total_loss" in line]
    assert len(losses) == steps
    assert all(map(math.isfinite, losses))
    return losses


@pytest.mark.parametrize("method", slow_but(("causvid",), ("finetune", "causvid", "self_forcing")))
def test_a_run_trains_on_clips_of_each_size(bucketed, write, tmp_path, seen, made, method):
    bucketed["data"]["path"] = write_data(tmp_path / "data", LARGEST, WIDE, PICTURE)
    causal = {"roles": ["student"], "chunk_frames": 1}
    if method == "finetune":
        use(bucketed, method, times="per_chunk")
    else:
        config = bucketed["method_config"]
        use(bucketed, method, **{k: v for k, v in config.items() if k != "rollout"})
    bucketed["pipeline_config"]["causal"] = causal
    train(bucketed, write, tmp_path / "out")
    assert set(seen) == {LARGEST, WIDE, PICTURE}
    assert set(made) == (set(seen) if method == "self_forcing" else set())


def test_a_run_of_buckets_goes_on_where_it_stopped(bucketed, write, tmp_path):
    bucketed["data"] = {
        "sets": [
            {"path": write_data(tmp_path / "clips", LARGEST, WIDE, count=5), "weight": 1.0},
            {"path": write_data(tmp_path / "pictures", PICTURE, count=3), "weight": 2.0},
        ]
    }
    use(bucketed, "finetune")
    bucketed["conditioning"] = {"dropout": {"text": 0.3}}
    bucketed["training"]["optimizer"]["schedule"] = {"name": "constant"}
    whole = train(bucketed, write, tmp_path / "whole", steps=6)
    train(bucketed, write, tmp_path / "parts", steps=3)
    parts = train(bucketed, write, tmp_path / "parts", steps=6)
    assert parts == whole


def test_a_size_that_no_bucket_has_is_named(bucketed, write, tmp_path):
    bucketed["data"]["path"] = write_data(tmp_path / "data", LARGEST, (8, 3, 4, 6))
    [problem] = problems(write(bucketed))
    assert ": data.path: " in problem
    assert "latents are [8, 3, 4, 6] [C, T, H, W], but the model takes [8, 2, 2, 6] or " in problem


def test_the_plan_lists_the_buckets_and_is_of_the_largest(bucketed, write, tmp_path):
    bucketed["data"]["path"] = write_data(tmp_path / "data", LARGEST, WIDE)
    config = read_config(write(bucketed))
    section = "\n".join(_data(config))
    assert "latents of 2 shapes; " in section
    assert "[8, 3, 4, 4]" in section
    assert "[8, 2, 2, 6]" in section
    assert config.latent_shapes == (LARGEST, WIDE, PICTURE)
    # What a call is planned by.
    assert config.family_plugin.latent_shape(config.pipeline, source=config.source) == LARGEST


def test_a_bucket_that_does_not_fit_is_a_problem_of_its_role(bucketed, write):
    larger = {"height": 512, "width": 512}  # and fits
    bucketed["pipeline_config"]["buckets"] = [larger, {"height": 16, "width": 640}]
    found = problems(write(bucketed))
    assert any("clips of 1 x 16 x 640: " in one and "positions for" in one for one in found)


# -- captions alone ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", slow_but(("dmd2",), ("dmd2", "self_forcing", "teacher_only")))
def test_methods_that_make_their_own_clips_train_on_captions(
    bucketed, write, tmp_path, seen, made, method
):
    bucketed["data"]["path"] = write_data(tmp_path / "data", None)
    config = bucketed["method_config"]
    if method == "self_forcing":
        bucketed["pipeline_config"]["causal"] = {"roles": ["student"], "chunk_frames": 1}
        use(bucketed, method, **{k: v for k, v in config.items() if k != "rollout"})
    elif method == "teacher_only":
        del bucketed["models"]["critic"]
        use(bucketed, method, input="student", student_sampler=config["student_sampler"])
    train(bucketed, write, tmp_path / "out")
    assert set(made) == set(seen) == {LARGEST, WIDE, PICTURE}


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("finetune", {}),
        ("dmd2", {"rollout": "data"}),
        ("dmd2", {"gan": {}}),
        ("causvid", {}),
    ],
    ids=["finetune", "data", "gan", "causvid"],
)
def test_methods_that_read_clips_refuse_captions_alone(values, write, tmp_path, method, config):
    values["data"]["path"] = write_data(tmp_path / "data", None)
    use(values, method, **config)
    found = problems(write(values))
    assert any("holds captions alone. The method is trained on latents" in one for one in found)


def test_captions_of_another_model_are_a_problem_too(values, write, tmp_path):
    values["data"]["path"] = write_data(tmp_path / "data", None)
    values["pipeline_config"]["max_sequence_length"] = 16
    [problem] = problems(write(values))
    assert "'text' is [8, 64] in each sample, but the model reads [16, 64]" in problem
