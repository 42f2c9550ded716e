"""Validation and report on one or several ranks, for ``ranks.run_on_ranks``."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import define, field
from distill_conditioning import DataConfig, DataPart, LatentDataset, LatentLoader
from distill_conformance.toy import TEXT_DIM, ToyAdapter, ToyConditioning
from distill_evaluation import report as report_module
from distill_evaluation.config import ReportConfig, ReportEntry
from distill_evaluation.judge import Judge
from distill_evaluation.report import ReportCallback
from distill_methods import FinetuneConfig, FinetuneMethod
from distill_protocols import (
    Callback,
    Capabilities,
    Condition,
    DistillError,
    ModelBundle,
    RowGenerators,
    RunParts,
    RunState,
    SamplerSpec,
    StepRecord,
    StepResult,
    StopFlag,
    StopRequested,
    derive_seed,
)
from distill_runtime import DistillMethod, Ranks
from distill_trainer import (
    LossEvaluator,
    PredictionsConfig,
    ValidationCallback,
    ValidationConfig,
    ViewConfig,
)
from rank_rows import GLOBAL_BATCH, Rows, rows_run
from torch import Tensor
from toy_roles import toy_bundle
from toy_trainer import MemoryTracker

JUDGE = Path(__file__).resolve().parents[1] / "configs" / "tiny" / "judge"
STOCHASTIC = SamplerSpec(steps=3, shift=3.0, stochastic=True)
GUIDED = SamplerSpec(steps=2, guidance=2.0)


class Texts(ToyConditioning):
    """A text of its own for every prompt."""

    def encode(
        self,
        prompts: Sequence[str],
        images: Tensor | None = None,
        last_images: Tensor | None = None,
    ) -> Condition:
        seeds = [derive_seed(0, prompt) for prompt in prompts]
        return Condition({"text": RowGenerators.seeded(0, "text", seeds).normal([TEXT_DIM])})


class Average:
    """A stand-in for averaged weights: those of another seed."""

    updates = 1

    @contextlib.contextmanager
    def swapped_in(self, module: torch.nn.Module) -> Any:
        own = {key: value.clone() for key, value in module.state_dict().items()}
        module.load_state_dict(toy_bundle(x=77)["x"].modules["transformer"].state_dict())
        try:
            yield
        finally:
            module.load_state_dict(own)


class _AskedFor(StopFlag):
    """A stop is asked of the last rank alone, in its ``number``-th poll; 0: never."""

    def __init__(self, ranks: Ranks, number: int) -> None:
        super().__init__(lambda own: next(filter(None, ranks.gather_results(lambda: own)), None))
        self.polls = 0
        self._number = number if ranks.rank == ranks.size - 1 else 0

    def poll(self) -> None:
        self.polls += 1
        if self.polls == self._number:
            self.request("preempted")
        super().poll()


def _run_hooks(callback: Callback, method: DistillMethod[Any], ranks: Ranks, folder: Path) -> dict:
    """Run the hooks of an iteration and of the end; return the files and clips of this rank."""
    tracker, printed, end = MemoryTracker(), io.StringIO(), "whole"
    run = RunState(
        method=method, loader=None, streams=method.streams, output_dir=folder, max_train_steps=1,
        trackers=(tracker,), ranks=ranks, iteration=1,
    )  # type: ignore[arg-type]  # fmt: skip
    step = StepRecord(iteration=1, losses={}, metrics=run.metrics, outputs={}, stepped=())
    before = {key: value.clone() for key, value in _weights(method).items()}
    with contextlib.redirect_stdout(printed):
        try:
            callback.on_train_start(run)
            callback.on_step_end(run, step)
            callback.on_train_end(run)
        except StopRequested as stop:
            end = f"stopped: {stop}"
        except (DistillError, OSError) as error:
            end = f"{type(error).__name__}: {error}"
    return {
        "end": end,
        "polls": method.stop.polls,
        "calls": method.adapter.calls,
        "metrics": run.metrics,
        "videos": {name: clips.numpy() for _, name, clips in tracker.videos},
        "texts": len(tracker.texts),
        "printed": printed.getvalue(),
        "weights stay": all(torch.equal(v, before[k]) for k, v in _weights(method).items()),
    }


def _weights(method: DistillMethod[Any]) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": value
        for key, module in method.model_dict.items()
        for name, value in module.state_dict().items()
    }


def validate(folder: Path, prompts: int, stop_at: int = 0, *, x0: bool = True) -> dict[str, Any]:
    """Validate the student, its average and a guided teacher, and what roles predict."""
    ranks = Ranks.of_this_run(60)
    bundle = toy_bundle(student=1, teacher=2)
    bundle["student"].ema["transformer"] = Average()
    config = FinetuneConfig(student_sampler=STOCHASTIC)
    method = FinetuneMethod(bundle, ToyAdapter(bundle), config, conditioning=Texts())
    method.stop = _AskedFor(ranks, stop_at)
    views = {
        "live": ViewConfig(role="student"),
        "ema": ViewConfig(role="student", ema=True),
        "teacher": ViewConfig(role="teacher", sampler=GUIDED),
    }
    validation = ValidationConfig(
        every_steps=1, prompts=tuple(f"prompt {n}" for n in range(prompts)), views=views,
        x0=PredictionsConfig(roles=("student", "teacher"), t=(300.0, 900.0)) if x0 else None,
    )  # fmt: skip
    return _run_hooks(ValidationCallback(validation, Texts()), method, ranks, folder)


@define(eq=False)
class Pixels:
    """Latents are pixels; a clip is made of its noise, its text, and a number of the role's."""

    bundle: ModelBundle
    latent_shape: tuple[int, ...]
    calls: list[int] = field(factory=list)
    capabilities = Capabilities()

    def decode(self, latents: Tensor) -> Tensor:
        return torch.sigmoid(latents)

    def sample(
        self, role: str, spec: SamplerSpec, noise: Tensor, cond: Condition, *,
        generators: RowGenerators, poll: Callable[[], None], **_: Any,
    ) -> Tensor:  # fmt: skip
        weight = self.bundle[role].modules["transformer"].outer.bias[0]
        x = noise + cond.tensors["text"].sum(dim=1).view(-1, 1, 1, 1, 1)
        for _ in range(spec.steps):
            poll()
            self.calls.append(len(noise))
            x = weight * x + generators.normal(noise.shape[1:])
        return x


def run_report(
    folder: Path, prompts: int, sheet_prompts: int, chunk: int, stop_at: int = 0
) -> dict[str, Any]:
    """Write a report during the run and one at the end, in chunks of ``chunk`` clips."""
    ranks = Ranks.of_this_run(60)
    bundle = toy_bundle(student=1, teacher=2)
    bundle["student"].ema["transformer"] = Average()
    network = Judge.load(JUDGE).network.config
    adapter = Pixels(bundle, (3, network.frames, network.height, network.width))
    config = FinetuneConfig(student_sampler=STOCHASTIC)
    method = FinetuneMethod(bundle, ToyAdapter(bundle), config, conditioning=Texts())
    method.adapter = adapter  # type: ignore[assignment]
    method.stop = _AskedFor(ranks, stop_at)
    lines = (JUDGE / "prompts.txt").read_text().splitlines()
    own = folder / f"prompts-{ranks.rank}.txt"
    own.write_text("\n".join(lines[:prompts]))
    entries = {
        "teacher": ReportEntry(role="teacher", sampler=GUIDED),
        "ema": ReportEntry(role="student", ema=True),
        "live": ReportEntry(role="student", sheet=False),
    }
    config = ReportConfig(
        judge=str(JUDGE), prompts=str(own), clips_per_prompt=2, every_steps=1,
        sheet_prompts=tuple(lines[-sheet_prompts:]), entries=entries, reference="teacher",
    )  # fmt: skip
    parts: Any = RunParts(
        method=method, adapter=adapter, conditioning=Texts(), exporter=None, output_dir=folder
    )
    usual, report_module.CHUNK = report_module.CHUNK, chunk
    try:
        callback = ReportCallback(config, parts)
        own.unlink()
        return _run_hooks(callback, method, ranks, folder)
    finally:
        report_module.CHUNK = usual


class NamedRows(Rows):
    """Its loss also under the name of the role whose turn it is."""

    def single_train_step(self, batch: Any, iteration: int) -> StepResult:
        result = super().single_train_step(batch, iteration)
        [key] = self.get_optimizers(iteration)
        result.loss_map[f"{key.split('.')[0]}_loss"] = result.loss_map["total_loss"]
        return result


def measure_losses(data: str, strategy: str) -> dict[str, Any]:
    """Measure losses on a part of ``data`` twice; return them, and whose samples they are of."""
    ranks = Ranks.of_this_run(60)
    run = rows_run(Path(data), strategy, NamedRows)
    loaders = [
        LatentLoader(
            LatentDataset(DataConfig(path=data)), batch_size=GLOBAL_BATCH // ranks.size, seed=5,
            rank=ranks.rank, world_size=ranks.size, part=DataPart(share=0.3, is_held_out=held_out),
        )
        for held_out in (True, False)
    ]  # fmt: skip
    method: Any = run.method
    state = RunState(
        method=method, loader=run.loader, streams=method.streams, output_dir=Path(data),
        max_train_steps=1, ranks=ranks,
    )  # type: ignore[arg-type]  # fmt: skip
    evaluator = LossEvaluator(*loaders, batches=3, seed=11)
    first, second = (evaluator.evaluate(state) for _ in range(2))
    return {
        "held_out": first.held_out, "training": first.training, "alike": first == second,
        "ids": [name for _, name, _, _ in method.seen],
    }  # fmt: skip
