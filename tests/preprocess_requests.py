"""A file of apps/preprocess for the tiny Wan, and a process that works on it, without torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import yaml

TINY = Path(__file__).resolve().parents[1] / "configs" / "tiny"
PIPELINE = {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 8}


def write_request(folder: Path, **changes: Any) -> Path:
    """Write ``folder / "data.yaml"``, for the clips in ``folder / "clips"``."""
    values = {
        "recipe": {"family": "wan"},
        "models": {"teacher": {"path": str(TINY / "wan")}},
        "pipeline_config": PIPELINE,
        "conditioning": {"negative_prompt": ""},
        "preprocess": {
            "output_dir": "./data", "sources": [{"folder": "./clips"}], "clips": {"fps": 8},
            "items_per_unit": 2, "batch_size": 2, "latent_dtype": "float32", "cpu_threads": 1,
            "device": "cpu", **changes,
        },
    }  # fmt: skip
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def work_on(folder: Path, rank: int, world: int) -> None:
    """Be one of the processes that work on ``folder / "data.yaml"``, and end like the app."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    from distill_preprocess.cli import main

    with (folder / "log.txt").open("a") as log:
        sys.stdout = sys.stderr = log
        raise SystemExit(main(["--config", str(folder / "data.yaml")]))
