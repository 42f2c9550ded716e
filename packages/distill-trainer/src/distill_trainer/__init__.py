"""DistillTrainer: the training loop, callbacks and trackers.

Names that need torch are imported on first use: run files are checked before torch is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

from distill_trainer.config import (
    DistributedConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
    ValidationConfig,
    ViewConfig,
)
from distill_trainer.plugins import (
    DebugDumpConfig,
    EmaConfig,
    GradClipConfig,
    ParamCountConfig,
    ProfilerConfig,
    StepTimerConfig,
)
from distill_trainer.trackers import build_trackers

if TYPE_CHECKING:
    from distill_trainer.batches import RestartingLoader
    from distill_trainer.callbacks.debug_dump import DebugDumpCallback
    from distill_trainer.callbacks.ema import EmaCallback
    from distill_trainer.callbacks.grad_clip import GradClipCallback
    from distill_trainer.callbacks.metrics import MetricsCallback
    from distill_trainer.callbacks.param_count import ParamCountCallback
    from distill_trainer.callbacks.profiler import ProfilerCallback
    from distill_trainer.callbacks.progress import ProgressCallback
    from distill_trainer.callbacks.step_timer import StepTimerCallback
    from distill_trainer.callbacks.validation import ValidationCallback
    from distill_trainer.ddp import DDPTrainStepWrapper
    from distill_trainer.distribution import Distribution
    from distill_trainer.ema import ExponentialMovingAverage
    from distill_trainer.finite import FiniteGuard, NonFiniteGradientError
    from distill_trainer.lockstep import check_same_run
    from distill_trainer.optimizers import build_optimizers, schedule_factor
    from distill_trainer.trackers.jsonl import JsonlTracker
    from distill_trainer.trackers.tensorboard import TensorBoardTracker
    from distill_trainer.trackers.wandb import WandbTracker
    from distill_trainer.trainer import DistillTrainer, TrainResult

_LAZY = {
    "DDPTrainStepWrapper": "ddp",
    "DebugDumpCallback": "callbacks.debug_dump",
    "DistillTrainer": "trainer",
    "Distribution": "distribution",
    "check_same_run": "lockstep",
    "EmaCallback": "callbacks.ema",
    "ExponentialMovingAverage": "ema",
    "FiniteGuard": "finite",
    "NonFiniteGradientError": "finite",
    "GradClipCallback": "callbacks.grad_clip",
    "JsonlTracker": "trackers.jsonl",
    "MetricsCallback": "callbacks.metrics",
    "ParamCountCallback": "callbacks.param_count",
    "ProfilerCallback": "callbacks.profiler",
    "ProgressCallback": "callbacks.progress",
    "RestartingLoader": "batches",
    "StepTimerCallback": "callbacks.step_timer",
    "TensorBoardTracker": "trackers.tensorboard",
    "TrainResult": "trainer",
    "ValidationCallback": "callbacks.validation",
    "WandbTracker": "trackers.wandb",
    "build_optimizers": "optimizers",
    "schedule_factor": "optimizers",
}

__all__ = [
    "DDPTrainStepWrapper",
    "DebugDumpCallback",
    "DebugDumpConfig",
    "DistillTrainer",
    "DistributedConfig",
    "Distribution",
    "EmaCallback",
    "EmaConfig",
    "ExponentialMovingAverage",
    "FiniteGuard",
    "GradClipCallback",
    "GradClipConfig",
    "JsonlTracker",
    "MetricsCallback",
    "NonFiniteGradientError",
    "OptimizerConfig",
    "ParamCountCallback",
    "ParamCountConfig",
    "ProfilerCallback",
    "ProfilerConfig",
    "ProgressCallback",
    "RestartingLoader",
    "ScheduleConfig",
    "StepTimerCallback",
    "StepTimerConfig",
    "TensorBoardTracker",
    "TrainResult",
    "TrainingConfig",
    "ValidationCallback",
    "ValidationConfig",
    "ViewConfig",
    "WandbTracker",
    "build_optimizers",
    "build_trackers",
    "check_same_run",
    "schedule_factor",
]

__getattr__ = lazy_exports(__name__, _LAZY)
