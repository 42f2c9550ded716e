"""Distillation methods and their pure maths: DMD2, teacher-only, finetune.

Names that need torch are imported on first use: run files are checked before torch is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from distill_methods.dmd2.config import DMD2Config
from distill_methods.finetune.config import FinetuneConfig
from distill_methods.teacher_only.config import TeacherOnlyConfig
from distill_methods.time_sampling import TimeSampling

if TYPE_CHECKING:
    from distill_methods.contracts import LatentDiffusion
    from distill_methods.dmd2.method import DMD2Method
    from distill_methods.finetune.method import FinetuneMethod
    from distill_methods.sampling import sample_views
    from distill_methods.teacher_only.method import TeacherOnlyMethod

_LAZY = {
    "DMD2Method": "dmd2.method",
    "FinetuneMethod": "finetune.method",
    "LatentDiffusion": "contracts",
    "TeacherOnlyMethod": "teacher_only.method",
    "sample_views": "sampling",
}

__all__ = [
    "DMD2Config",
    "DMD2Method",
    "FinetuneConfig",
    "FinetuneMethod",
    "LatentDiffusion",
    "TeacherOnlyConfig",
    "TeacherOnlyMethod",
    "TimeSampling",
    "sample_views",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(f"distill_methods.{_LAZY[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
