"""The callbacks and trackers of this package as plugins. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from distill_protocols import CallbackPlugin, PlannedRun, Problem, RunParts, TrackerPlugin

from distill_trainer.callbacks.configs import (
    DebugDumpConfig,
    EmaConfig,
    GradClipConfig,
    ParamCountConfig,
    ProfilerConfig,
    StepTimerConfig,
)

if TYPE_CHECKING:
    from distill_protocols import Callback, Tracker


class EmaPlugin(CallbackPlugin[EmaConfig]):
    name = "ema"
    contract = 2
    help = "keeps an exponential moving average of a role's weights"
    config_class = EmaConfig

    def averages(self, config: EmaConfig) -> tuple[str, ...]:
        return config.roles

    def problems(self, config: EmaConfig, run: PlannedRun) -> Iterator[Problem]:
        for name in config.roles:
            yield from (Problem("roles", p.message) for p in run.role_problems(name))
            if name in run.roles and not run.roles[name].trainable:
                yield Problem(
                    "roles", f"{name!r} is frozen: its weights never move, so leave it out"
                )

    def build(self, config: EmaConfig, parts: RunParts) -> Callback:
        from distill_trainer.callbacks.ema import EmaCallback

        return EmaCallback(config)


class GradClipPlugin(CallbackPlugin[GradClipConfig]):
    name = "grad_clip"
    contract = 2
    help = "clips gradients, with one norm for each optimizer"
    config_class = GradClipConfig

    def build(self, config: GradClipConfig, parts: RunParts) -> Callback:
        from distill_trainer.callbacks.grad_clip import GradClipCallback

        return GradClipCallback(config)


class StepTimerPlugin(CallbackPlugin[StepTimerConfig]):
    name = "step_timer"
    contract = 2
    help = "reports seconds per iteration and samples per second"
    config_class = StepTimerConfig

    def build(self, config: StepTimerConfig, parts: RunParts) -> Callback:
        from distill_trainer.callbacks.metrics import StepTimerCallback

        return StepTimerCallback(config)


class ProfilerPlugin(CallbackPlugin[ProfilerConfig]):
    name = "profiler"
    contract = 2
    help = "writes a torch.profiler trace of a few iterations"
    config_class = ProfilerConfig

    def build(self, config: ProfilerConfig, parts: RunParts) -> Callback:
        from distill_trainer.callbacks.diagnostics import ProfilerCallback

        return ProfilerCallback(config)


class ParamCountPlugin(CallbackPlugin[ParamCountConfig]):
    name = "param_count"
    contract = 2
    help = "logs how many parameters each role has"
    config_class = ParamCountConfig

    def build(self, config: ParamCountConfig, parts: RunParts) -> Callback:
        from distill_trainer.callbacks.metrics import ParamCountCallback

        return ParamCountCallback()


class DebugDumpPlugin(CallbackPlugin[DebugDumpConfig]):
    name = "debug_dump"
    contract = 2
    help = "writes a step's outputs and losses to disk, now and then or after an error"
    config_class = DebugDumpConfig

    def build(self, config: DebugDumpConfig, parts: RunParts) -> Callback:
        from distill_trainer.callbacks.diagnostics import DebugDumpCallback

        return DebugDumpCallback(config)


class JsonlPlugin(TrackerPlugin):
    name = "jsonl"
    contract = 2
    help = "writes numbers and texts to metrics.jsonl, one JSON object per log point"

    def build(self, output_dir: Path) -> Tracker:
        from distill_trainer.trackers.jsonl import JsonlTracker

        return JsonlTracker(output_dir / "metrics.jsonl")


class TensorBoardPlugin(TrackerPlugin):
    name = "tensorboard"
    contract = 2
    help = "writes numbers, texts and clips to tensorboard/"

    def build(self, output_dir: Path) -> Tracker:
        from distill_trainer.trackers.tensorboard import TensorBoardTracker

        return TensorBoardTracker(output_dir / "tensorboard")


class WandbPlugin(TrackerPlugin):
    name = "wandb"
    contract = 2
    help = "sends numbers, texts and clips to Weights & Biases (needs the package wandb)"

    def problems(self) -> Iterator[Problem]:
        if not _is_installed("wandb"):
            yield Problem(
                "",
                "wandb must be installed to be logged to, and is not: it is an optional extra, as "
                "it talks to a service. Install the package wandb, or leave the tracker out.",
            )

    def build(self, output_dir: Path) -> Tracker:
        from distill_trainer.trackers.wandb import WandbTracker

        return WandbTracker(output_dir)


class MlflowPlugin(TrackerPlugin):
    name = "mlflow"
    contract = 2
    help = "sends numbers, texts and clips to MLflow, or into mlruns/ (needs the package mlflow)"

    def problems(self) -> Iterator[Problem]:
        if not _is_installed("mlflow"):
            yield Problem(
                "",
                "mlflow must be installed to be logged to, and is not: it is an optional extra. "
                "Install the package mlflow or mlflow-skinny, or leave the tracker out.",
            )

    def build(self, output_dir: Path) -> Tracker:
        from distill_trainer.trackers.mlflow import MlflowTracker

        return MlflowTracker(output_dir)


def _is_installed(package: str) -> bool:
    spec = find_spec(package)
    # Without an origin it is just a folder of that name, such as wandb leaves behind.
    return spec is not None and spec.origin is not None


ema = EmaPlugin()
grad_clip = GradClipPlugin()
step_timer = StepTimerPlugin()
profiler = ProfilerPlugin()
param_count = ParamCountPlugin()
debug_dump = DebugDumpPlugin()
jsonl = JsonlPlugin()
mlflow = MlflowPlugin()
tensorboard = TensorBoardPlugin()
wandb = WandbPlugin()
