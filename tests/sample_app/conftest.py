"""Runs that are sampled: one whose averaged and live weights differ, and a causal one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from distill_runfile.cli import EXIT_OK
from distill_train.cli import main as train

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny"
PIPELINE = {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 8}
PROMPTS = ["the digit three moving up", "the digit seven moving left"]
TEACHER = {"steps": 3, "shift": 3.0, "guidance": 1.5}


def run_file(out: Path, **sections: Any) -> Path:
    """Four iterations of DMD2 on the tiny Wan, of which EMA and live weights differ."""
    values = {
        "recipe": {"family": "wan", "method": "dmd2"},
        "models": {name: {"path": str(TINY / "wan")} for name in ("student", "teacher", "critic")},
        "training": {
            "output_dir": str(out), "max_train_steps": 4, "global_batch_size": 2,
            "progress": False, "trackers": [], "optimizer": {"lr": 1e-2},
        },
        "data": {"path": str(TINY / "data")},
        "pipeline_config": PIPELINE,
        "method_config": {
            "generator_update_interval": 2, "real_score_guidance_scale": 1.5,
            "student_sampler": {"steps": 2, "timesteps": [1000, 700], "stochastic": True},
        },
        "callbacks": {"ema": {"roles": ["student"], "decay": 0.5}},
        "checkpoint": {"export": [{"role": "student", "folder": "student", "ema": True}]},
        "validation": {
            "every_steps": 0, "at_end": False, "prompts": PROMPTS, "fps": 6,
            "views": {"teacher": {"role": "teacher", "sampler": TEACHER}},
        },
        **sections,
    }  # fmt: skip
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="session")
def out(tmp_path_factory) -> Path:
    """Output folder of a run."""
    folder = tmp_path_factory.mktemp("run") / "out"
    assert train(["--config", str(run_file(folder))]) == EXIT_OK
    return folder


@pytest.fixture(scope="session")
def causal(tmp_path_factory) -> Path:
    """Output folder of a run whose student makes clips chunk by chunk, with a window."""
    folder = tmp_path_factory.mktemp("causal") / "out"
    section = {"roles": ["student"], "chunk_frames": 1, "window_frames": 2, "sink_frames": 1}
    file = run_file(
        folder,
        recipe={"family": "wan", "method": "finetune"},
        models={"student": {"path": str(TINY / "wan")}},
        pipeline_config=PIPELINE | {"causal": section},
        method_config={"student_sampler": {"steps": 2, "shift": 3.0, "guidance": 1.5}},
        callbacks={},
        conditioning={"negative_prompt": ""},
        checkpoint={},
        validation=None,
    )
    assert train(["--config", str(file)]) == EXIT_OK
    return folder
