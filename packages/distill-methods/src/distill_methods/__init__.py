"""Distillation methods and their pure maths: DMD2, teacher-only, finetune.

Names that need torch are imported on first use: run files are checked before torch is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

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

__getattr__ = lazy_exports(__name__, _LAZY)
