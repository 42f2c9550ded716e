"""What several processes do together in tests (see ``ranks``), beside training."""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from distill_checkpoint import (
    CheckpointConfig,
    CheckpointManager,
    ExportCallback,
    ExportConfig,
    KeepBestConfig,
    claim_output_dir,
    export,
    output_folder,
)
from distill_conditioning import (
    CachedConditioning,
    ConditioningConfig,
    DataConfig,
    LatentDataset,
)
from distill_protocols import (
    Callback,
    Condition,
    DistillError,
    OutputError,
    RoleSpec,
    RunState,
    StepRecord,
    WeightSource,
)
from distill_runtime import ALONE, Ranks
from ranks import run_of_rank
from torch import distributed
from torch.distributed.tensor import DTensor
from toy_data import CountingEncoder

TIMEOUT = 30.0


def text_of_error(action: Callable[[], Any]) -> Any:
    """Run ``action``; return its result, or the text of the framework's error."""
    try:
        return action()
    except DistillError as error:
        return f"{type(error).__name__}: {error}"


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# -- saves --------------------------------------------------------------------------------------


def save_after_a_look(folder: Path, strategy: str) -> list[bool]:
    """Call every module without gradients, and save: whether the optimizers' names are of parts."""
    run = run_of_rank(seed=0, strategy=strategy)
    roles = run.method.bundle.roles
    with torch.no_grad():
        for role in roles.values():
            for module in role.modules.values():
                module(torch.ones(2, 4))
    left = next(roles["student"].modules["transformer"].parameters())
    manager = CheckpointManager(CheckpointConfig(), folder, {})
    manager.save(run.state(folder, 1), run.callbacks)
    parameters = roles["student"].trained_parameters("transformer").values()
    return [isinstance(left, DTensor), all(isinstance(value, DTensor) for value in parameters)]


def save_at(folder: Path, iterations: Sequence[int]) -> str:
    """Save, each rank at its own iteration."""
    run = run_of_rank(seed=0, strategy="ddp")
    manager = CheckpointManager(CheckpointConfig(timeout_seconds=TIMEOUT), folder, {})
    return text_of_error(
        lambda: str(manager.save(run.state(folder, iterations[rank()]), run.callbacks))
    )


class Score(Callback):
    """Measures what ``keep_best`` compares: each rank its own number, or their sharded mean."""

    name = "score"

    def __init__(self, scores: Mapping[int, float], sharded: bool) -> None:
        self._scores = scores
        self._sharded = sharded

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        score = self._scores.get(step.iteration)
        if score is None:
            return
        if self._sharded:
            mesh = torch.distributed.init_device_mesh("cpu", (distributed.get_world_size(),))
            own = torch.full((), score / distributed.get_world_size())
            partial = [torch.distributed.tensor.Partial()]
            run.metrics["score"] = DTensor.from_local(own, mesh, partial)
        else:
            run.metrics["score"] = score


def keep(folder: Path, scores_of_ranks: Sequence[Mapping[int, float]], sharded: bool) -> None:
    """Save every iteration, and keep the last and the best one."""
    run = run_of_rank(seed=0, strategy="fsdp2")
    run.callbacks["score"] = Score(scores_of_ranks[rank()], sharded)
    rule = KeepBestConfig(metric="score")
    config = CheckpointConfig(every_steps=1, keep_last=1, keep_best=rule, timeout_seconds=TIMEOUT)
    steps = max(map(len, scores_of_ranks))
    run.train(folder, steps, CheckpointManager(config, folder, {}))


# -- the output folder ----------------------------------------------------------------------------


def claim(folders: Sequence[Path], resume: bool, after: str) -> str:
    """Claim this rank's one of ``folders``; the first rank returns whether it holds the lock."""
    output_folder.VISIBLE_AFTER = 0.2
    ranks = Ranks.of_this_run(TIMEOUT)
    try:
        claimed = claim_output_dir(folders[rank()], resume=resume, ranks=ranks)
    except OutputError as error:
        return str(error)
    if after == "kill the last" and rank() == ranks.size - 1:
        die()
    if after == "kill the first" and ranks.is_first:
        die()
    try:
        claim_output_dir(folders[rank()], resume=True)
    except OutputError as error:
        result = "held" if f"pid {os.getpid()}" in str(error) else "held by another"
    else:
        result = "free"
    ranks.gather_results(lambda: None)
    if after == "release":
        claimed.release()
    return result


# -- export -------------------------------------------------------------------------------------


class ToyExporter:
    """Writes each tensor into a file of its own, as it is read.

    Args:
        problem: what happens when the third tensor was read: nothing, ``raise``, or ``refuse`` (an
            error of the framework).
    """

    def __init__(self, problem: str = "") -> None:
        self._problem = problem

    def export(
        self, role: RoleSpec, weights: Mapping[str, WeightSource], folder: Path, request: Any
    ) -> Mapping[str, Any]:
        count = 0
        for key, source in weights.items():
            for name, info in source.describe().items():
                tensor = source.read([name])[name]
                count += 1
                assert (tuple(tensor.shape), tensor.dtype) == (info.size, info.dtype)
                assert type(tensor) is torch.Tensor
                if self._problem and count == 3:
                    raise (OutputError if self._problem == "refuse" else OSError)("disk full")
                file = folder / key / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(tensor.numpy().tobytes())
        (folder / "request").write_text(repr(request))
        return {"notes": []}

    def verify(
        self, role: RoleSpec, weights: Mapping[str, WeightSource], folder: Path, request: Any
    ) -> Mapping[str, Any]:
        for key, source in weights.items():
            for name in source.describe():
                (read,) = source.read([name]).values()
                assert (folder / key / name).read_bytes() == read.numpy().tobytes()
        return {"notes": ["read back"]}


def exports() -> list[ExportConfig]:
    return [
        ExportConfig(role="student", folder="live", verify=True),
        ExportConfig(role="student", folder="ema", ema=True),
    ]


def train_and_export(folder: Path, strategy: str, problem: str = "") -> Any:
    """Train three iterations and export: how many whole tensors others than rank 0 had at once."""
    run = run_of_rank(seed=0, strategy=strategy)
    spec = RoleSpec(name="student", path="somewhere", trainable=True)
    exporter = ToyExporter("" if problem == "kill" else problem)
    run.callbacks["export"] = ExportCallback(
        exports(), exporter, {"student": spec}, folder, timeout=TIMEOUT
    )
    config = CheckpointConfig(timeout_seconds=TIMEOUT)
    alive, most = weakref.WeakSet[torch.Tensor](), [0]
    to_full, count = export.to_full, [0]

    def watched(tensor: torch.Tensor) -> torch.Tensor:
        most[0] = max(most[0], len(alive))
        full = to_full(tensor)
        alive.add(full)
        count[0] += 1
        if problem == "kill" and rank() == 1 and count[0] == 3:
            die()
        return full

    export.to_full = watched
    return text_of_error(
        lambda: (run.train(folder, 3, CheckpointManager(config, folder, {})), most[0], count[0])[1:]
    )


# -- conditioning -------------------------------------------------------------------------------


def encode(
    folder: Path,
    data: Path | None,
    negative: str | None,
    fingerprint: str | None,
    prompts: Sequence[Sequence[str]],
) -> Any:
    """Encode the negative condition and this rank's prompts; return them and the calls."""
    encoder = CountingEncoder(fingerprint if rank() == 0 else "of nobody else")
    ranks = Ranks.of_this_run(TIMEOUT) if distributed.is_initialized() else ALONE

    def ask() -> dict[str, Any]:
        conditioning = CachedConditioning(
            ConditioningConfig(negative_prompt=negative),
            encoder=encoder,
            dataset=LatentDataset(DataConfig(path=str(data))) if data else None,
            output_dir=folder,
            ranks=ranks,
        )
        conditions = [conditioning.negative(), conditioning.encode(prompts[rank()])]
        # What was asked for once may be asked for by one alone.
        if rank() == 0:
            conditions.append(conditioning.encode(prompts[0][:1]))
            conditioning.negative()
        return {"conditions": [_numbers(each) for each in conditions], "calls": encoder.calls}

    return text_of_error(ask)


def _numbers(condition: Condition) -> dict[str, list[Any]]:
    return {name: value.tolist() for name, value in condition.tensors.items()}
