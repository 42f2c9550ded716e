"""Distillation methods and their maths: DMD2, Self-Forcing, CausVid, rCM, consistency (LCM, sCM),
LADD, KD, Phased DMD, teacher-only, flow maps, finetune.

Names that need torch are imported on first use: run files are checked before torch is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

from distill_methods.adversarial.config import GanConfig
from distill_methods.causal_consistency.config import CausalConsistencyConfig
from distill_methods.causvid.config import CausVidConfig
from distill_methods.consistency.config import ConsistencyConfig, Continuous, Discrete
from distill_methods.distribution_matching.whole_clips import AnchorConfig
from distill_methods.dmd2.config import DMD2Config
from distill_methods.finetune.config import FinetuneConfig
from distill_methods.flow_map.config import FlowMap, FlowMapConfig
from distill_methods.flow_map_dmd.config import FlowMapDMDConfig
from distill_methods.kd.config import KDConfig
from distill_methods.ladd.config import LaddConfig
from distill_methods.phased_dmd.config import PhasedDMDConfig
from distill_methods.rcm.config import RCMConfig
from distill_methods.self_forcing.config import SelfForcingConfig
from distill_methods.streaming_long_tuning.config import StreamingConfig
from distill_methods.teacher_only.config import TeacherOnlyConfig
from distill_methods.teachers.config import TeacherTerm
from distill_methods.time_sampling import TimeSampling

if TYPE_CHECKING:
    from distill_methods.causal_consistency.method import CausalConsistencyMethod
    from distill_methods.causvid.method import CausVidMethod
    from distill_methods.consistency.method import ConsistencyMethod
    from distill_methods.contracts import LatentDiffusion
    from distill_methods.dmd2.method import DMD2Method
    from distill_methods.finetune.method import FinetuneMethod
    from distill_methods.flow_map.method import FlowMapMethod
    from distill_methods.flow_map_dmd.method import FlowMapDMDMethod
    from distill_methods.kd.method import KDMethod
    from distill_methods.ladd.method import LaddMethod
    from distill_methods.phased_dmd.method import PhasedDMDMethod
    from distill_methods.rcm.method import RCMMethod
    from distill_methods.self_forcing.method import SelfForcingMethod
    from distill_methods.streaming_long_tuning.method import StreamingMethod
    from distill_methods.teacher_only.method import TeacherOnlyMethod
    from distill_methods.validation_sampling import ViewSampler

_LAZY = {
    "ConsistencyMethod": "consistency.method",
    "CausalConsistencyMethod": "causal_consistency.method",
    "CausVidMethod": "causvid.method",
    "DMD2Method": "dmd2.method",
    "FinetuneMethod": "finetune.method",
    "FlowMapDMDMethod": "flow_map_dmd.method",
    "FlowMapMethod": "flow_map.method",
    "KDMethod": "kd.method",
    "LaddMethod": "ladd.method",
    "LatentDiffusion": "contracts",
    "PhasedDMDMethod": "phased_dmd.method",
    "RCMMethod": "rcm.method",
    "SelfForcingMethod": "self_forcing.method",
    "StreamingMethod": "streaming_long_tuning.method",
    "TeacherOnlyMethod": "teacher_only.method",
    "ViewSampler": "validation_sampling",
}

__all__ = [
    "AnchorConfig",
    "CausVidConfig",
    "CausVidMethod",
    "CausalConsistencyConfig",
    "CausalConsistencyMethod",
    "ConsistencyConfig",
    "ConsistencyMethod",
    "Continuous",
    "DMD2Config",
    "DMD2Method",
    "Discrete",
    "FinetuneConfig",
    "FinetuneMethod",
    "FlowMap",
    "FlowMapConfig",
    "FlowMapDMDConfig",
    "FlowMapDMDMethod",
    "FlowMapMethod",
    "GanConfig",
    "KDConfig",
    "KDMethod",
    "LaddConfig",
    "LaddMethod",
    "LatentDiffusion",
    "PhasedDMDConfig",
    "PhasedDMDMethod",
    "RCMConfig",
    "RCMMethod",
    "SelfForcingConfig",
    "SelfForcingMethod",
    "StreamingConfig",
    "StreamingMethod",
    "TeacherOnlyConfig",
    "TeacherOnlyMethod",
    "TeacherTerm",
    "TimeSampling",
    "ViewSampler",
]

__getattr__ = lazy_exports(__name__, _LAZY)
