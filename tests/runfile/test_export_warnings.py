"""Warnings, before training, of what an export will not do as the run does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distill_runfile import describe, export_warnings, read_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = [f for f in sorted(CONFIGS.glob("*/*.yaml")) if not f.stem.startswith("trajectories")]


@pytest.fixture
def two_experts(tmp_path: Path) -> Path:
    """Write the shipped pipeline with its transformer twice."""
    folder, shipped = tmp_path / "two", CONFIGS / "tiny" / "wan"
    folder.mkdir()
    for part in shipped.iterdir():
        if part.is_dir():
            (folder / part.name).symlink_to(part)
    (folder / "transformer_2").symlink_to(shipped / "transformer")
    index = json.loads((shipped / "model_index.json").read_text())
    index |= {"transformer_2": index["transformer"], "boundary_ratio": 0.8}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_stock_pipelines_walk_the_times_of_all_shipped_students():
    assert len(FILES) > 20
    for file in FILES:
        assert export_warnings(read_config(file, planning=True)) == [], file


@pytest.mark.parametrize(
    ("times", "largest"),
    [((987.65, 933.78, 852.90, 608.98), "12.4"), ((999, 937, 833, 624), "1.0")],
    ids=["rcm", "fastgen"],
)
def test_times_that_a_stock_scheduler_cannot_make_are_a_warning_of_the_plan(
    times, largest, values, write
):
    values["method_config"]["student_sampler"] = {"steps": 4, "timesteps": list(times)}
    text = describe(read_config(write(values)))
    (warning,) = [line for line in text.splitlines() if "warning:" in line]
    assert warning.startswith("  warning: export student: stock pipelines will take t = 1000, ")
    assert f"off by up to {largest}" in warning
    values["checkpoint"]["export"][0]["format"] = "comfyui"  # which has samplers of its own
    assert "warning:" not in describe(read_config(write(values)))


def test_an_expert_that_is_never_trained_is_left_out_of_a_lora(values, write, two_experts):
    export = {"role": "student", "folder": "s", "format": "lora", "lora_rank": 2}
    values["checkpoint"]["export"] = [export]
    for role in values["models"].values():
        role["path"] = str(two_experts)
    values["pipeline_config"] |= {"causal": {"roles": ["student"], "chunk_frames": 1}}
    values["recipe"]["method"] = "self_forcing"
    values["method_config"] = {
        "last_step_only": True,
        "real_score_guidance_scale": 1.5,
        "student_sampler": {"steps": 2, "timesteps": [1000, 700], "stochastic": True},
    }
    text = describe(read_config(write(values)))
    assert "  s: student (live weights) as lora, at the end" in text
    assert "    transformer is never trained, so it is left out" in text
    assert "transformer_2 is never trained" not in text
    values["method_config"]["last_step_only"] = False
    assert "never trained" not in describe(read_config(write(values)))
