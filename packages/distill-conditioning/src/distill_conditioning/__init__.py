"""Latent data sets, loaders and the negative condition.

Names that need torch are imported on first use: run files are checked before torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

from distill_conditioning.config import ConditioningConfig, DataConfig, DataSetConfig
from distill_conditioning.dataset_info import DataInfo, DatasetInfo, data_info, dataset_info
from distill_conditioning.fingerprints import Comparison, Difference, compare_fingerprints
from distill_conditioning.format import DatasetIndex, SampleShape, ShardEntry

if TYPE_CHECKING:
    from distill_conditioning.held_out import DataPart
    from distill_conditioning.loader import LatentLoader
    from distill_conditioning.preprocessing import ClipEncoder, preprocess
    from distill_conditioning.provider import CachedConditioning, ConditionCache
    from distill_conditioning.reading import LatentDataset, StoredNegative
    from distill_conditioning.trajectories import TrajectoryFolder
    from distill_conditioning.units import ItemKey, ReportLine, Summary, UnitFolder, UnitRecord
    from distill_conditioning.writing import ShardRows, ShardWriter

_LAZY = {
    **dict.fromkeys(["CachedConditioning", "ConditionCache"], "provider"),
    "ClipEncoder": "preprocessing",
    "DataPart": "held_out",
    "LatentDataset": "reading",
    "LatentLoader": "loader",
    "ShardRows": "writing",
    "ShardWriter": "writing",
    "StoredNegative": "reading",
    "TrajectoryFolder": "trajectories",
    "preprocess": "preprocessing",
    **dict.fromkeys(["ItemKey", "ReportLine", "Summary", "UnitFolder", "UnitRecord"], "units"),
}

__all__ = [
    "CachedConditioning",
    "ClipEncoder",
    "Comparison",
    "ConditionCache",
    "ConditioningConfig",
    "DataConfig",
    "DataInfo",
    "DataPart",
    "DataSetConfig",
    "DatasetIndex",
    "DatasetInfo",
    "Difference",
    "ItemKey",
    "LatentDataset",
    "LatentLoader",
    "ReportLine",
    "SampleShape",
    "ShardEntry",
    "ShardRows",
    "ShardWriter",
    "StoredNegative",
    "Summary",
    "TrajectoryFolder",
    "UnitFolder",
    "UnitRecord",
    "compare_fingerprints",
    "data_info",
    "dataset_info",
    "preprocess",
]

__getattr__ = lazy_exports(__name__, _LAZY)
