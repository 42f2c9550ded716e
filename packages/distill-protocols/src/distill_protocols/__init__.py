"""The contracts and value objects of the distillation framework.

Names that need torch are imported on first use: plugin descriptors and run-file checks import
this package before torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.capabilities import ONE_TENSOR, Capabilities, PredType
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
    StorageError,
    WeightsError,
)
from distill_protocols.exports import Exporter, ExportRecord, ExportRequest, ForeignNames
from distill_protocols.fingerprint import WHOLE_ENCODER, Fingerprint
from distill_protocols.given_frames import FrameConditions, GivenFrames
from distill_protocols.lazy import lazy_exports
from distill_protocols.method_config import HealthKind, MethodConfig
from distill_protocols.metrics import (
    Better,
    Metric,
    MetricInput,
    MetricInputs,
    MetricNumber,
    MetricParts,
    RealClips,
    Samples,
    Shared,
)
from distill_protocols.planned_run import PlannedRun
from distill_protocols.plugins import (
    CONTRACT_VERSION,
    CallbackPlugin,
    CaptionTokens,
    FamilyPlugin,
    Group,
    MethodPlugin,
    MetricPlugin,
    Plugin,
    RunParts,
    TrackerPlugin,
)
from distill_protocols.problems import Problem, below
from distill_protocols.roles import (
    EXIT_EMBEDDING,
    CompileSpec,
    DiscriminatorSpec,
    ExitSpec,
    FsdpPolicy,
    LoraSpec,
    Precision,
    RoleNeed,
    RoleOptions,
    RoleSpec,
    TargetTimeSpec,
)
from distill_protocols.sampler import DynamicShift, SamplerSpec, SampleView, Solver, shift_sigma
from distill_protocols.stop import StopFlag, StopRequested

if TYPE_CHECKING:
    from distill_protocols.adapter import (
        CausalRollout,
        ConditionEncoder,
        Denoiser,
        Discriminating,
        DistillAdapter,
        ExitConditioning,
        ExpertRouting,
        FlowMaps,
        ImageConditioning,
        JointLatents,
        LatentCodec,
        NoiseSchedule,
        OptionalContracts,
        Sampler,
        Tangents,
        draw_noise,
    )
    from distill_protocols.batch import (
        Batch,
        BatchLoader,
        Condition,
        ConditioningProvider,
        EpochLoader,
        SeveralNegatives,
    )
    from distill_protocols.bundle import (
        DTYPES,
        ModelBundle,
        RestartableSchedule,
        RoleHandle,
        WeightAverage,
    )
    from distill_protocols.callbacks import (
        Callback,
        Checkpointer,
        DescribedTracker,
        ResumableTracker,
        RunDescription,
        RunState,
        StepRecord,
        SummaryTracker,
        Tracker,
    )
    from distill_protocols.latents import (
        LatentParts,
        Latents,
        LatentShape,
        LatentsT,
        PartShapes,
        cut_parts,
        flatten_parts,
        main_part,
        map_latents,
        one_tensor,
        restore_parts,
    )
    from distill_protocols.method import (
        HeldOutEvaluating,
        LatentViews,
        StepResult,
        TrainableMethod,
    )
    from distill_protocols.plans import CallPlan, ModulePlan, RolePlan, TensorPlan
    from distill_protocols.random import RandomStreams, RowGenerators, derive_seed
    from distill_protocols.ranks import RankGroup
    from distill_protocols.weights import TensorInfo, TensorWeights, WeightSource

_LAZY = {
    **dict.fromkeys(
        ["CausalRollout", "ConditionEncoder", "Denoiser", "Discriminating", "DistillAdapter",
         "ExitConditioning", "ExpertRouting", "FlowMaps", "ImageConditioning", "JointLatents",
         "LatentCodec", "NoiseSchedule", "OptionalContracts", "Sampler", "Tangents", "draw_noise"],
        "adapter",
    ),
    **dict.fromkeys(
        ["Batch", "BatchLoader", "Condition", "ConditioningProvider", "EpochLoader",
         "SeveralNegatives"],
        "batch",
    ),
    **dict.fromkeys(
        ["LatentParts", "LatentShape", "Latents", "LatentsT", "PartShapes", "cut_parts",
         "flatten_parts", "main_part", "map_latents", "one_tensor", "restore_parts"],
        "latents",
    ),
    **dict.fromkeys(
        ["DTYPES", "ModelBundle", "RestartableSchedule", "RoleHandle", "WeightAverage"], "bundle"
    ),
    **dict.fromkeys(
        ["Callback", "Checkpointer", "DescribedTracker", "ResumableTracker", "RunDescription",
         "RunState", "StepRecord", "SummaryTracker", "Tracker"],
        "callbacks",
    ),
    **dict.fromkeys(
        ["HeldOutEvaluating", "LatentViews", "StepResult", "TrainableMethod"], "method"
    ),
    **dict.fromkeys(["CallPlan", "ModulePlan", "RolePlan", "TensorPlan"], "plans"),
    **dict.fromkeys(["RandomStreams", "RowGenerators", "derive_seed"], "random"),
    "RankGroup": "ranks",
    **dict.fromkeys(["TensorInfo", "TensorWeights", "WeightSource"], "weights"),
}  # fmt: skip

__all__ = [
    "CONTRACT_VERSION",
    "DTYPES",
    "EXIT_EMBEDDING",
    "ONE_TENSOR",
    "WHOLE_ENCODER",
    "Batch",
    "BatchLoader",
    "Better",
    "CallPlan",
    "Callback",
    "CallbackPlugin",
    "Capabilities",
    "CapabilityError",
    "CaptionTokens",
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
    "DescribedTracker",
    "Discriminating",
    "DiscriminatorSpec",
    "DistillAdapter",
    "DistillError",
    "DynamicShift",
    "EpochLoader",
    "ExitConditioning",
    "ExitSpec",
    "ExpertRouting",
    "ExportRecord",
    "ExportRequest",
    "Exporter",
    "FamilyPlugin",
    "Fingerprint",
    "FlowMaps",
    "ForeignNames",
    "FrameConditions",
    "FsdpPolicy",
    "GivenFrames",
    "Group",
    "HealthKind",
    "HeldOutEvaluating",
    "ImageConditioning",
    "JointLatents",
    "LatentCodec",
    "LatentParts",
    "LatentShape",
    "LatentViews",
    "Latents",
    "LatentsT",
    "LoraSpec",
    "MethodConfig",
    "MethodPlugin",
    "Metric",
    "MetricInput",
    "MetricInputs",
    "MetricNumber",
    "MetricParts",
    "MetricPlugin",
    "ModelBundle",
    "ModulePlan",
    "NoiseSchedule",
    "NonFiniteLossError",
    "OptionalContracts",
    "OutputError",
    "PartShapes",
    "PlannedRun",
    "Plugin",
    "PluginError",
    "Precision",
    "PredType",
    "Problem",
    "RandomStreams",
    "RankError",
    "RankGroup",
    "RealClips",
    "RestartableSchedule",
    "ResumableTracker",
    "RoleError",
    "RoleHandle",
    "RoleNeed",
    "RoleOptions",
    "RolePlan",
    "RoleSpec",
    "RowGenerators",
    "RunDescription",
    "RunParts",
    "RunState",
    "SampleView",
    "Sampler",
    "SamplerSpec",
    "Samples",
    "SeveralNegatives",
    "Shared",
    "Solver",
    "StepRecord",
    "StepResult",
    "StopFlag",
    "StopRequested",
    "StorageError",
    "SummaryTracker",
    "Tangents",
    "TargetTimeSpec",
    "TensorInfo",
    "TensorPlan",
    "TensorWeights",
    "Tracker",
    "TrackerPlugin",
    "TrainableMethod",
    "WeightAverage",
    "WeightSource",
    "WeightsError",
    "below",
    "cut_parts",
    "derive_seed",
    "draw_noise",
    "flatten_parts",
    "main_part",
    "map_latents",
    "one_tensor",
    "restore_parts",
    "shift_sigma",
]  # fmt: skip

__getattr__ = lazy_exports(__name__, _LAZY)
