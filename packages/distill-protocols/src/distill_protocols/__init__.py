"""The contracts and value objects of the distillation framework.

Names that need torch are imported on first use: plugin descriptors and run-file checks import
this package before torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.capabilities import Capabilities, PredType
from distill_protocols.causal import Chunk, ChunkCall, CleanPast
from distill_protocols.errors import (
    CapabilityError,
    CheckpointError,
    ConditioningError,
    ConfigError,
    ContractError,
    DataError,
    DistillError,
    NonFiniteLossError,
    OutputError,
    PluginError,
    RankError,
    RoleError,
    WeightsError,
)
from distill_protocols.lazy import lazy_exports
from distill_protocols.plugins import (
    CallbackPlugin,
    CompileSpec,
    ExportFormat,
    ExportRequest,
    FamilyPlugin,
    ForeignNames,
    FsdpPolicy,
    HeadSpec,
    LoraSpec,
    MethodPlugin,
    PlannedRun,
    RoleNeed,
    RoleSpec,
    RunParts,
    load_plugin,
    plugin_names,
)
from distill_protocols.sampler import SamplerSpec, SampleView, shift_sigma
from distill_protocols.stop import StopFlag, StopRequested

if TYPE_CHECKING:
    from distill_protocols.adapter import (
        CausalRollout,
        ConditionEncoder,
        Denoiser,
        Discriminating,
        DistillAdapter,
        ExpertRouting,
        Exporter,
        ImageConditioning,
        LatentCodec,
        NoiseSchedule,
        Sampler,
        Tangents,
    )
    from distill_protocols.batch import Batch, BatchLoader, Condition, ConditioningProvider
    from distill_protocols.bundle import (
        DTYPES,
        CallPlan,
        ModelBundle,
        ModulePlan,
        Precision,
        RoleHandle,
        RolePlan,
        TensorPlan,
        WeightAverage,
    )
    from distill_protocols.callbacks import Callback, Checkpointer, RunState, StepRecord, Tracker
    from distill_protocols.method import DistillMethod, StepResult
    from distill_protocols.random import RandomStreams, RowGenerators, derive_seed
    from distill_protocols.ranks import ALONE, Ranks
    from distill_protocols.spread import Spread
    from distill_protocols.weights import TensorFacts, TensorWeights, WeightSource

_LAZY = {
    **dict.fromkeys(
        ["CausalRollout", "ConditionEncoder", "Denoiser", "Discriminating", "DistillAdapter",
         "ExpertRouting", "Exporter", "ImageConditioning", "LatentCodec", "NoiseSchedule",
         "Sampler", "Tangents"],
        "adapter",
    ),
    **dict.fromkeys(["Batch", "BatchLoader", "Condition", "ConditioningProvider"], "batch"),
    **dict.fromkeys(
        ["DTYPES", "CallPlan", "ModelBundle", "ModulePlan", "Precision", "RoleHandle", "RolePlan",
         "TensorPlan", "WeightAverage"],
        "bundle",
    ),
    **dict.fromkeys(["Callback", "Checkpointer", "RunState", "StepRecord", "Tracker"], "callbacks"),
    **dict.fromkeys(["DistillMethod", "StepResult"], "method"),
    **dict.fromkeys(["RandomStreams", "RowGenerators", "derive_seed"], "random"),
    **dict.fromkeys(["ALONE", "Ranks"], "ranks"),
    "Spread": "spread",
    **dict.fromkeys(["TensorFacts", "TensorWeights", "WeightSource"], "weights"),
}  # fmt: skip

__all__ = [
    "ALONE",
    "DTYPES",
    "Batch",
    "BatchLoader",
    "CallPlan",
    "Callback",
    "CallbackPlugin",
    "Capabilities",
    "CapabilityError",
    "CausalRollout",
    "CheckpointError",
    "Checkpointer",
    "Chunk",
    "ChunkCall",
    "CleanPast",
    "CompileSpec",
    "Condition",
    "ConditionEncoder",
    "ConditioningError",
    "ConditioningProvider",
    "ConfigError",
    "ContractError",
    "DataError",
    "Denoiser",
    "Discriminating",
    "DistillAdapter",
    "DistillError",
    "DistillMethod",
    "ExpertRouting",
    "ExportFormat",
    "ExportRequest",
    "Exporter",
    "FamilyPlugin",
    "ForeignNames",
    "FsdpPolicy",
    "HeadSpec",
    "ImageConditioning",
    "LatentCodec",
    "LoraSpec",
    "MethodPlugin",
    "ModelBundle",
    "ModulePlan",
    "NoiseSchedule",
    "NonFiniteLossError",
    "OutputError",
    "PlannedRun",
    "PluginError",
    "Precision",
    "PredType",
    "RandomStreams",
    "RankError",
    "Ranks",
    "RoleError",
    "RoleHandle",
    "RoleNeed",
    "RolePlan",
    "RoleSpec",
    "RowGenerators",
    "RunParts",
    "RunState",
    "SampleView",
    "Sampler",
    "SamplerSpec",
    "Spread",
    "StepRecord",
    "StepResult",
    "StopFlag",
    "StopRequested",
    "Tangents",
    "TensorFacts",
    "TensorPlan",
    "TensorWeights",
    "Tracker",
    "WeightAverage",
    "WeightSource",
    "WeightsError",
    "derive_seed",
    "load_plugin",
    "plugin_names",
    "shift_sigma",
]  # fmt: skip

__getattr__ = lazy_exports(__name__, _LAZY)
