"""DistillTrainer: the training loop, callbacks and trackers.

Names that need torch are imported on first use: run files are checked before torch is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

from distill_trainer.attention import FLASH_VERSIONS, use_flash_version
from distill_trainer.callbacks.configs import (
    DebugDumpConfig,
    EmaConfig,
    GradClipConfig,
    ParamCountConfig,
    ProfilerConfig,
    StepTimerConfig,
)
from distill_trainer.config import (
    DistributedConfig,
    HeldOutDataConfig,
    OptimizerConfig,
    PredictionsConfig,
    ScheduleConfig,
    TrainingConfig,
    ValidationConfig,
    ViewConfig,
)
from distill_trainer.trackers import build_trackers, tracker_problems

if TYPE_CHECKING:
    from distill_trainer.callbacks.diagnostics import DebugDumpCallback, ProfilerCallback
    from distill_trainer.callbacks.ema import EmaCallback, ExponentialMovingAverage
    from distill_trainer.callbacks.grad_clip import GradClipCallback
    from distill_trainer.callbacks.metrics import (
        MetricsCallback,
        ParamCountCallback,
        StepTimerCallback,
    )
    from distill_trainer.callbacks.progress import ProgressCallback
    from distill_trainer.distribution.launch import check_same_run
    from distill_trainer.distribution.strategy import Distribution
    from distill_trainer.loop.batches import RestartingLoader
    from distill_trainer.loop.trainer import DistillTrainer, TrainResult
    from distill_trainer.monitoring.finite_guard import FiniteGuard, NonFiniteGradientError
    from distill_trainer.optimizers import build_optimizers, schedule_factor
    from distill_trainer.trackers.jsonl import JsonlTracker
    from distill_trainer.trackers.tensorboard import TensorBoardTracker
    from distill_trainer.trackers.wandb import WandbTracker
    from distill_trainer.validation.callback import ValidationCallback
    from distill_trainer.validation.losses import HeldOutLosses, LossEvaluator

_LAZY = {
    "DebugDumpCallback": "callbacks.diagnostics",
    "DistillTrainer": "loop.trainer",
    "Distribution": "distribution.strategy",
    "EmaCallback": "callbacks.ema",
    "ExponentialMovingAverage": "callbacks.ema",
    "FiniteGuard": "monitoring.finite_guard",
    "GradClipCallback": "callbacks.grad_clip",
    "HeldOutLosses": "validation.losses",
    "JsonlTracker": "trackers.jsonl",
    "LossEvaluator": "validation.losses",
    "MetricsCallback": "callbacks.metrics",
    "NonFiniteGradientError": "monitoring.finite_guard",
    "ParamCountCallback": "callbacks.metrics",
    "ProfilerCallback": "callbacks.diagnostics",
    "ProgressCallback": "callbacks.progress",
    "RestartingLoader": "loop.batches",
    "StepTimerCallback": "callbacks.metrics",
    "TensorBoardTracker": "trackers.tensorboard",
    "TrainResult": "loop.trainer",
    "ValidationCallback": "validation.callback",
    "WandbTracker": "trackers.wandb",
    "build_optimizers": "optimizers",
    "check_same_run": "distribution.launch",
    "schedule_factor": "optimizers",
}

__all__ = [
    "FLASH_VERSIONS",
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
    "HeldOutDataConfig",
    "HeldOutLosses",
    "JsonlTracker",
    "LossEvaluator",
    "MetricsCallback",
    "NonFiniteGradientError",
    "OptimizerConfig",
    "ParamCountCallback",
    "ParamCountConfig",
    "PredictionsConfig",
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
    "tracker_problems",
    "use_flash_version",
]

__getattr__ = lazy_exports(__name__, _LAZY)
