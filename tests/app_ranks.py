"""The app on ranks that are forked (see ``ranks``): whole runs of the tiny Wan in seconds."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from distill_checkpoint import StoredCheckpoint
from distill_protocols import Callback, DataError, DistillError, RunState, StepRecord
from distill_runfile.read import read_config
from distill_sample.cli import main as sample_app
from distill_train import build as build_module
from distill_train import run as app
from distill_train.build import Run
from tiny_file import tiny_values, write_changed
from torch import Tensor, distributed


def run_file(path: Path, method: str, **changes: Any) -> Path:
    """Write ``configs/tiny/<method>.yaml`` with ``changes`` and without what only reports."""
    values = tiny_values(method)
    for section in ("validation",):
        values.pop(section, None)
    values["callbacks"].pop("report", None)
    values["checkpoint"] = {"resume": "latest"}
    values["training"] |= {
        "output_dir": str(path.parent / path.stem),
        "log_every": 1,
        "progress": False,
        "trackers": ["jsonl"],
    }
    return write_changed(path, values, changes)


def train(file: Path) -> str:
    """Train on one rank of a run; return "" or the error."""
    try:
        app.run(read_config(file, world_size=distributed.get_world_size()))
    except DistillError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def sample(args: Sequence[str]) -> int:
    """Sample clips as one of the ranks; return the exit status."""
    return sample_app(list(args))


def train_own(files: Sequence[Path]) -> str:
    """Train as ``train`` does, with a run file of this rank's own."""
    return train(files[distributed.get_rank()])


def train_with_failing_rank(file: Path, what: str) -> tuple[str, float]:
    """Train while rank 1 fails in the part ``what`` of ``build``; return the error and seconds."""

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise DataError("no such file on this machine")

    assert hasattr(build_module, what), f"{what} is gone: nothing would fail"
    if distributed.get_rank() == 1:
        setattr(build_module, what, fails)
    began = time.monotonic()
    return train(file), time.monotonic() - began


class _Fails(Callback):
    """Ends one rank in the middle of an iteration."""

    name = "fails"

    def __init__(self, rank: int, iteration: int, how: str) -> None:
        self._who = (rank, iteration)
        self._how = how

    def on_before_optimizer_step(self, run: RunState) -> None:
        if (distributed.get_rank(), run.iteration) == self._who:
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[self._how])

    def on_step_end(self, run: RunState, step: StepRecord) -> None: ...


def train_and_lose_rank(file: Path, rank: int, iteration: int, how: str) -> str:
    """Train as ``train`` does; ``rank`` is killed or stopped before it steps in ``iteration``."""
    build = app.build

    def with_failure(*args: Any, **kwargs: Any) -> Run:
        run = build(*args, **kwargs)
        run.trainer.callbacks["fails"] = _Fails(rank, iteration, how)
        return run

    app.build = with_failure  # type: ignore[assignment]
    return train(file)


def train_and_list_samples(file: Path) -> list[tuple[int, tuple[int, ...], tuple[str, ...]]]:
    """Train as ``train`` does; return iteration, shape and ids of the batches of this rank."""
    build = app.build
    trained: list[tuple[int, tuple[int, ...], tuple[str, ...]]] = []

    def listing(*args: Any, **kwargs: Any) -> Run:
        run = build(*args, **kwargs)
        step = run.method.single_train_step

        def record(batch: Any, iteration: int) -> Any:
            trained.append((iteration, tuple(batch.latent_shape), batch.ids))
            return step(batch, iteration)

        run.method.single_train_step = record  # type: ignore[method-assign]
        return run

    app.build = listing  # type: ignore[assignment]
    error = train(file)
    assert not error, error
    return trained


_COMPARED = ("loss/", "grad_norm/", "student_", "dmd_")


def read_losses(folder: Path) -> dict[int, dict[str, float]]:
    """Read the losses and gradient norms that the run logged, by iteration."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        line["iteration"]: {
            k: v
            for k, v in line.items()
            if k.startswith(("loss/", "grad_norm/", "student_", "dmd_"))
        }
        for line in lines
    }


def read_weights(
    folder: Path, *, ema: bool = False, module: str = "transformer"
) -> dict[str, Tensor]:
    """Read the student's weights of the newest checkpoint."""
    newest = max(folder.glob("checkpoint-*"))
    source = StoredCheckpoint.open(newest).weights("student", ema=ema)[module]
    return source.read(source.describe())


def largest_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return the largest difference between two sets of weights."""
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


def assert_weights_alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Compare weights that AdamW trained on sums which were added up in another order.

    All elements agree to 2e-4, but for three at most. AdamW divides by the root of a square: an
    element whose gradient is almost 0 steps with either sign, here by at most 6e-4 an update, of
    which a few are taken.
    """
    assert a.keys() == b.keys()
    differences = torch.cat([(a[name].float() - b[name].float()).abs().flatten() for name in a])
    assert int((differences >= 2e-4).sum()) <= 3
    assert float(differences.max()) < 2e-3


torch.set_num_threads(1)
