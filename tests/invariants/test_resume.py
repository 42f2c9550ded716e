"""Invariant 13 in whole runs: n steps, save, load, m steps == n + m steps, bit for bit, for
run files of every shipped method on the tiny Wan, its data set and loader."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import yaml
from attrs import asdict, frozen
from distill_runfile.read import read_config
from distill_train.build import Run, build
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_runs import write_trajectories
from tiny_run import one_process

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny"
SAMPLER = {"steps": 2, "timesteps": [1000, 700], "stochastic": True}
METHODS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "dmd2": (
        ("student", "teacher", "critic"),
        {"real_score_guidance_scale": [1.5, 1.25], "critic_exits": True, "exit": [1.0, 3.0]},
    ),
    "dmd2_gan": (
        ("student", "teacher", "critic", "discriminator"),
        {
            "real_score_guidance_scale": 1.5,
            "gan": {"train_features": True, "r1_weight": 1.0},
            "f_divergence": "js",
        },
    ),
    "dmd2_anchor": (
        ("student", "teacher", "critic"),
        {
            "real_score_guidance_scale": 1.5,
            "anchor": {"teacher_steps": 4, "anchor_step": 2},
            "critic_interpolation": 0.1,
        },
    ),
    "phased_dmd": (
        ("student", "teacher", "critic"),
        {
            "real_score_guidance_scale": 1.5,
            "critic_interpolation": 0.1,
            "student_sampler": {"steps": 2, "timesteps": [1000, 700]},
        },
    ),
    "ladd": (("student", "teacher", "discriminator"), {"r1_weight": 1.0}),
    "finetune": (("student",), {}),
    "teacher_only": (("student", "teacher"), {"guidance_scale": 1.5}),
    "kd": (("student",), {}),
    "self_forcing": (
        ("student", "teacher", "critic"),
        {"real_score_guidance_scale": 1.5, "same_step_across_chunks": False},
    ),
    "streaming_long_tuning": (
        ("student", "teacher", "critic"),
        {
            "real_score_guidance_scale": 1.5,
            "video_frames": 9,
            "overlap_frames": 1,
            "switch_probability": 0.5,
        },
    ),
    "causvid": (
        ("student", "teacher", "critic"),
        {"real_score_guidance_scale": 1.5, "critic_exits": True},
    ),
    "flow_map": (
        ("student", "teacher"),
        {"flow_map": {"guidance_scale": 1.5}, "student_sampler": {"steps": 2, "shift": 3.0}},
    ),
    "consistency": (
        ("student", "teacher"),
        {"guidance_scale": 1.5, "discrete": {"steps": 8, "skip": 2}},
    ),
    "causal_consistency": (
        ("student", "teacher"),
        {"guidance_scale": 1.5, "discrete": {"steps": 8}},
    ),
    "rcm": (
        ("student", "teacher", "critic"),
        {"real_score_guidance_scale": 1.5, "continuous": {"tangent_warmup": 2}},
    ),
}
"""Name -> (roles, options; the sampler is SAMPLER where they have none)."""
MATCHING = (
    "dmd2", "dmd2_gan", "dmd2_anchor", "phased_dmd", "rcm", "self_forcing", "causvid",
    "streaming_long_tuning",
)  # fmt: skip
CAUSAL = {
    "self_forcing": ["student"], "causvid": ["student"],
    "causal_consistency": ["student", "teacher"], "streaming_long_tuning": ["student"],
}  # fmt: skip
"""The causal roles."""


@frozen(kw_only=True)
class Case:
    """What may differ between two runs."""

    n: int
    m: int
    method: str = "dmd2"
    interval: int = 2
    critic_update: str = "alternate"
    rollout: str = "simulate"
    accumulation: int = 1
    ema: bool = True
    precision: str = "fp32"
    lora: bool = False
    workers: int = 0
    dropout: float = 0.0
    async_save: bool = False

    def run_file(self, folder: Path, steps: int) -> dict[str, Any]:
        roles, options = METHODS[self.method]
        trained = [name for name in roles if name != "teacher"]
        path = TINY / ("wan_experts" if self.method == "phased_dmd" else "wan")
        models: dict[str, dict[str, Any]] = {name: {"path": str(path)} for name in roles}
        if "discriminator" in models:
            on = "critic" if "critic" in models else "teacher"
            models["discriminator"] = {"heads": {"on": on, "blocks": [1, 3], "width": 8}}
        for name in trained:
            if name == "discriminator":
                continue  # which is always fp32, and whole
            models[name]["precision"] = self.precision
            if self.lora:
                models[name]["lora"] = {"rank": 2}
        method = {"student_sampler": SAMPLER, **options}
        if self.method == "causal_consistency":
            method["target"] = "ema" if self.ema else "student"
        if self.method in MATCHING:
            method |= {
                "generator_update_interval": self.interval,
                "critic_update": self.critic_update,
            }
            if "critic_interpolation" in options:
                method["critic_update"] = "every_step"
            if self.method not in (*CAUSAL, "phased_dmd"):
                method["rollout"] = self.rollout
        name = self.method.removesuffix("_gan").removesuffix("_anchor")
        return {
            "recipe": {"family": "wan", "method": name},
            "models": models,
            "training": {
                "output_dir": str(folder), "max_train_steps": steps, "progress": False,
                "trackers": [], "global_batch_size": 2 * self.accumulation,
                "batch_size_per_device": 2, "optimizer": {"lr": 1e-3},
            },
            "data": {"path": str(self.data(folder)), "workers": self.workers},
            "conditioning": {"dropout": self.dropout},
            "pipeline_config": {
                "num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 8,
            } | (
                {"causal": {"roles": CAUSAL[self.method], "chunk_frames": 1}}
                if self.method in CAUSAL else {}
            ),
            "method_config": method,
            "checkpoint": {"every_steps": 1, "resume": "latest", "async_save": self.async_save},
            "callbacks": {"grad_clip": {}} | (
                {"ema": {"roles": trained, "decay": 0.5}} if self.ema else {}
            ),
        }  # fmt: skip

    def data(self, folder: Path) -> Path:
        if self.method != "kd":
            return TINY / "data"
        path = folder.parent / "trajectories"
        return path if path.exists() else write_trajectories(TINY / "data", path, samples=11)

    def train(self, folder: Path, steps: int) -> Run:
        folder.mkdir(exist_ok=True)
        file = folder / "run.yaml"
        file.write_text(yaml.safe_dump(self.run_file(folder, steps)))
        run = build(read_config(file), distribution=one_process())
        result = run.trainer.run(run.method, run.loader)
        assert result.iteration == steps
        return run


def everything(run: Run) -> dict[str, Any]:
    by_module = run.bundle.by_module
    return {
        "weights": {key: module.state_dict() for key, module in by_module("modules").items()},
        "optimizers": {key: o.state_dict() for key, o in by_module("optimizers").items()},
        "schedulers": {key: s.state_dict() for key, s in by_module("schedulers").items()},
        "ema": {key: e.state_dict() for key, e in by_module("ema").items()},
        "method": run.method.state_dict(),
        "method of this rank": run.method.rank_state(),
        "loader": run.loader.state_dict(),
        "streams": run.method.streams.state_dict(),
    }


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        return [line for key in a for line in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple):
        pairs = zip(a, b, strict=True)
        return [d for i, (x, y) in enumerate(pairs) for d in differences(x, y, f"{path}.{i}")]
    return [] if a == b else [path]


cases = st.builds(
    Case,
    n=st.integers(1, 3),
    m=st.integers(1, 3),
    method=st.sampled_from(sorted(METHODS)),
    interval=st.integers(2, 3),
    critic_update=st.sampled_from(["alternate", "every_step"]),
    rollout=st.sampled_from(["simulate", "data"]),
    accumulation=st.integers(1, 2),
    ema=st.booleans(),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    lora=st.booleans(),
    workers=st.integers(0, 2),
    dropout=st.sampled_from([0.0, 0.5]),
    async_save=st.booleans(),
)
DMD2 = Case(n=2, m=2, critic_update="every_step", accumulation=2, workers=2, async_save=True)
KD = Case(n=1, m=2, method="kd", accumulation=2, workers=1)
TEACHER_ONLY = Case(n=1, m=2, method="teacher_only", precision="bf16", lora=True, dropout=0.5)


@settings(max_examples=1)
@given(cases)
@example(DMD2)
@example(Case(**{**asdict(DMD2), "method": "self_forcing", "precision": "fp16", "lora": True}))
def test_13_n_steps_save_load_m_steps_is_n_plus_m_steps(case: Case):
    assert_parts_make_the_whole(case)


@pytest.mark.slow
@settings(max_examples=8)
@given(cases)
@example(Case(**{**asdict(DMD2), "method": "dmd2_gan", "workers": 0}))
@example(Case(**{**asdict(DMD2), "precision": "fp16", "lora": True}))
@example(Case(**{**asdict(DMD2), "method": "dmd2_anchor", "lora": True}))
@example(Case(**{**asdict(DMD2), "method": "phased_dmd", "workers": 0}))
@example(TEACHER_ONLY)
@example(KD)
@example(Case(n=1, m=2, method="causal_consistency", accumulation=2))
@example(Case(n=2, m=3, method="streaming_long_tuning", accumulation=2, async_save=True))
@example(Case(**{**asdict(DMD2), "method": "self_forcing"}))
@example(Case(**{**asdict(DMD2), "method": "rcm", "precision": "bf16", "workers": 0}))
def test_13_n_steps_save_load_m_steps_is_n_plus_m_steps_of_every_method(case: Case):
    assert_parts_make_the_whole(case)


def assert_parts_make_the_whole(case: Case):
    # Of DMD2 each part must be a right run file by itself, and so train the student once.
    needed = {"ladd": 2} | dict.fromkeys(MATCHING, case.interval)
    n = max(case.n, needed.get(case.method, 1))
    with TemporaryDirectory() as name:
        full = case.train(Path(name) / "whole", n + case.m)
        case.train(Path(name) / "parts", n)
        parts = case.train(Path(name) / "parts", n + case.m)
        assert differences(everything(full), everything(parts)) == []
