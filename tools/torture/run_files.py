"""The run files that are tortured: small enough that most of a run's time is saving."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny"
WAN = str(TINY / "wan")
_SAMPLER = {"steps": 2, "timesteps": [1000, 700], "stochastic": True}


def shipped(output_dir: Path, steps: int, *, lora: bool = False) -> dict[str, Any]:
    """The shipped tiny DMD2 run in short."""
    roles: dict[str, dict[str, Any]] = {
        role: {"path": WAN} for role in ("student", "teacher", "critic")
    }
    if lora:
        for role in ("student", "critic"):
            roles[role]["lora"] = {"rank": 4}
    return {
        "recipe": {"family": "wan", "method": "dmd2"},
        "models": roles,
        "training": {
            "output_dir": str(output_dir),
            "max_train_steps": steps,
            "global_batch_size": 4,
            "batch_size_per_device": 2,
            "cpu_threads": 1,
            "progress": False,
            "trackers": [],
            "optimizer": {"lr": 1e-3, "schedule": {"name": "cosine"}},
        },
        "data": {"path": str(TINY / "data")},
        "pipeline_config": {
            "num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 8,
        },
        "method_config": {
            "rollout": "simulate",
            "generator_update_interval": 2,
            "real_score_guidance_scale": 1.5,
            "student_sampler": _SAMPLER,
        },
        "checkpoint": {"every_steps": 2, "resume": "latest"},
        "callbacks": {"ema": {"roles": ["student"], "decay": 0.9}, "grad_clip": {}},
    }  # fmt: skip


def self_forcing(output_dir: Path, steps: int) -> dict[str, Any]:
    """Self-Forcing with LoRA roles beside one base, saves in the background, the best kept, and
    two workers that read ahead."""
    values = shipped(output_dir, steps)
    values["recipe"]["method"] = "self_forcing"
    for role in ("student", "critic"):
        values["models"][role] = {"base": "teacher", "lora": {"rank": 4}}
    values["training"] |= {"trackers": ["jsonl"], "log_every": 1}
    values["data"]["workers"] = 2
    values["pipeline_config"]["causal"] = {"roles": ["student"], "chunk_frames": 1}
    values["method_config"] = {
        "generator_update_interval": 2,
        "critic_update": "every_step",
        "real_score_guidance_scale": 1.5,
        "student_sampler": _SAMPLER,
    }
    values["checkpoint"] |= {
        "async_save": True,
        "keep_last": 2,
        "keep_best": {"metric": "loss/critic_loss", "mode": "min", "count": 2},
        "export": [{"role": "student", "folder": "student", "ema": True}],
    }
    return values


def two_ranks(output_dir: Path, steps: int) -> dict[str, Any]:
    """Two processes with sharded roles, a validation every second iteration."""
    values = shipped(output_dir, steps)
    values["training"] |= {
        "batch_size_per_device": 1, "trackers": ["jsonl"], "log_every": 1,
        "distributed": {"strategy": "fsdp2", "timeout_seconds": 60},
    }  # fmt: skip
    values["checkpoint"]["every_steps"] = 3
    return _validated(values, every_steps=2)


def everything(output_dir: Path, steps: int, *, async_save: bool) -> dict[str, Any]:
    """All that a run writes: both trackers, validation, report, checkpoints and exports."""
    values = shipped(output_dir, steps)
    values["training"] |= {"trackers": ["jsonl", "tensorboard"], "log_every": 1}
    values["checkpoint"] |= {
        "async_save": async_save,
        "export": [
            {"role": "student", "folder": "student", "ema": True},
            {"role": "student", "folder": "comfy", "format": "comfyui"},
        ],
    }
    values["callbacks"]["report"] = {
        "judge": str(TINY / "judge"),
        "prompts": str(TINY / "judge" / "prompts.txt"),
        "clips_per_prompt": 2,
        "sheet_prompts": ["the digit two moving right"],
        "entries": {"student_2": {"role": "student"}},
    }
    return _validated(values, every_steps=2)


def trajectories(output_dir: Path, samples: int) -> dict[str, Any]:
    """Trajectories of the tiny teacher in many small shards."""
    return {
        "recipe": {"family": "wan"},
        "models": {"teacher": {"path": WAN}},
        "data": {"path": str(TINY / "data")},
        "pipeline_config": {
            "num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 8,
        },
        "trajectories": {
            "output_dir": str(output_dir),
            "sampler": {"steps": 4, "shift": 3.0, "guidance": 1.5},
            "keep_times": [1000, 750],
            "limit": samples,
            "batch_size": 5,
            "samples_per_shard": 10,
            "cpu_threads": 1,
        },
    }  # fmt: skip


def write(file: Path, values: Mapping[str, Any]) -> Path:
    """Write a run file."""
    file.write_text(yaml.safe_dump(dict(values), sort_keys=False))
    return file


def _validated(values: dict[str, Any], *, every_steps: int) -> dict[str, Any]:
    values["validation"] = {
        "prompts": ["the digit three moving up", "the digit seven moving left"],
        "every_steps": every_steps,
        "views": {"student_2": {"role": "student"}},
    }
    return values
