"""Sections of a run file: arithmetic and refusals."""

from __future__ import annotations

import importlib
import math
import re
from pathlib import Path

import pytest
from distill_protocols import SamplerSpec
from distill_trainer import (
    DistributedConfig,
    EmaConfig,
    GradClipConfig,
    HeldOutDataConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
    ValidationConfig,
    ViewConfig,
    tracker_problems,
)
from hypothesis import given
from hypothesis import strategies as st


@given(per_device=st.integers(1, 8), micro=st.integers(1, 8), world=st.integers(1, 8))
def test_accumulation_is_the_global_batch_over_what_goes_at_once(
    per_device: int, micro: int, world: int
) -> None:
    config = TrainingConfig(
        output_dir="x", max_train_steps=1,
        global_batch_size=per_device * micro * world, batch_size_per_device=per_device,
    )  # fmt: skip
    assert config.accumulation(world) == micro


def test_an_indivisible_batch_is_refused_with_the_arithmetic() -> None:
    config = TrainingConfig(
        output_dir="x", max_train_steps=1, global_batch_size=10, batch_size_per_device=4
    )
    with pytest.raises(ValueError, match=r"10 samples.*4 a device.*2\.5 micro steps.* 8 or 12"):
        config.accumulation()
    with pytest.raises(ValueError, match=r"\(4 a device \* 2 device\(s\) = 8\).* 8 or 16"):
        config.accumulation(2)
    config = TrainingConfig(output_dir="x", max_train_steps=1, global_batch_size=6)
    assert config.accumulation() == 1
    with pytest.raises(ValueError, match=r"over 4 devices.* Use 4 or 8"):
        config.accumulation(4)


VIEWS = {"student": ViewConfig(role="student")}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TrainingConfig(output_dir=" ", max_train_steps=1), "must not be empty"),
        (
            lambda: TrainingConfig(output_dir="x", max_train_steps=0),
            "0 must be within",
        ),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), r"\[0, 1\)"),
        (lambda: OptimizerConfig(lr=0.0), r"0\.0 must be above 0: at 0 no weight moves.*frozen"),
        (lambda: OptimizerConfig(lr=math.inf), "inf must be above 0 and finite"),
        (lambda: OptimizerConfig(weight_decay=math.nan), "nan must be at least 0 and finite"),
        (lambda: SamplerSpec(steps=1, shift=math.inf), "inf must be above 0 and finite"),
        (lambda: SamplerSpec(steps=1, guidance=math.nan), "nan must be at least 0 and finite"),
        (lambda: SamplerSpec(steps=1, timesteps=(math.nan,)), "must fall strictly within"),
        (lambda: SamplerSpec(steps=1, timesteps=()), "0 timesteps for 1 steps"),
        (lambda: GradClipConfig(max_norm=math.inf), "inf must be .*null to clip nothing"),
        (
            lambda: TrainingConfig(output_dir="x", max_train_steps=1, batch_size_per_device=0),
            "0 must be at least 1: a forward call needs a sample",
        ),
        (lambda: ScheduleConfig(final_ratio=0.1), "constant rate"),
        (lambda: EmaConfig(roles=("student",), decay=1.0), "never move"),
        (lambda: EmaConfig(roles=()), "nothing would be averaged"),
        (
            lambda: ValidationConfig(prompts=(), views={"s": ViewConfig(role="student")}),
            "at least one prompt",
        ),
        (lambda: ValidationConfig(prompts=("a",), views={}), "at least one view"),
        (
            lambda: ValidationConfig(prompts=("a",), views={"../x": ViewConfig(role="student")}),
            "file name",
        ),
        (lambda: ValidationConfig(prompts=("a",), views=VIEWS, fps=1e9), r"within \[0\.1, 240\]"),
        (lambda: ValidationConfig(prompts=("a",), views=VIEWS, fps=1e-9), r"within \[0\.1, 240\]"),
        (
            lambda: ValidationConfig(prompts=("a",), views=VIEWS, batches=10**9),
            "each is a step of the method",
        ),
        (lambda: ViewConfig(role="student", latent_frames=10**6), "in memory at once"),
    ],
)
def test_wrong_values_are_refused_with_the_reason(make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        make()


def messages(*trackers: str) -> list[str]:
    return [problem.message for problem in tracker_problems(trackers)]


def test_trackers_that_cannot_be_had_are_problems() -> None:
    assert messages("jsonl", "tensorboard") == []
    (twice,) = messages("jsonl", "jsonl")
    assert "jsonl is named twice" in twice
    (unknown,) = messages("tensorbord")
    assert "unknown tracker 'tensorbord'; did you mean 'tensorboard'" in unknown


def test_wandb_that_is_not_installed_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "wandb").mkdir()  # as wandb leaves behind where it ran
    (missing,) = messages("wandb")
    assert re.search(r"wandb must be installed .*leave the tracker out", missing)
    (tmp_path / "wandb" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert messages("wandb") == []


def test_a_group_size_is_for_hsdp_only() -> None:
    assert DistributedConfig(strategy="hsdp", shard_size=2).shard_size == 2
    with pytest.raises(ValueError, match="2 with strategy fsdp2; only hsdp has groups"):
        DistributedConfig(strategy="fsdp2", shard_size=2)


VIEWS = {"student": ViewConfig(role="student")}


def test_first_frames_of_a_validation_are_there_before_it(tmp_path: Path) -> None:
    here, nowhere = tmp_path / "a.png", tmp_path / "b.png"
    here.write_bytes(b"")
    ValidationConfig(prompts=("a",), images=(str(here),), views=VIEWS)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(nowhere))}: no such file"):
        ValidationConfig(prompts=("a", "b"), images=(str(here), str(nowhere)), views=VIEWS)


def test_losses_are_measured_where_data_are_held_out() -> None:
    assert ValidationConfig(share=0.1).measures_losses
    assert ValidationConfig(data=HeldOutDataConfig(path="x")).measures_losses
    assert not ValidationConfig(prompts=("a",), views=VIEWS).measures_losses
    with pytest.raises(ValueError, match="must hold at least one prompt"):
        ValidationConfig()
