"""Latent data sets, loaders and the negative condition.

Names that need torch are imported on first use: run files are checked before torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

from distill_conditioning.config import ConditioningConfig, DataConfig
from distill_conditioning.facts import DatasetInfo, dataset_info
from distill_conditioning.index import DatasetIndex, ShardEntry

if TYPE_CHECKING:
    from distill_conditioning.loader import LatentLoader
    from distill_conditioning.preprocessing import ClipEncoder, preprocess
    from distill_conditioning.provider import CachedConditioning
    from distill_conditioning.shard_rows import ShardRows
    from distill_conditioning.shards import LatentDataset, ShardWriter, StoredNegative
    from distill_conditioning.trajectories import TrajectoryFolder

_LAZY = {
    "CachedConditioning": "provider",
    "ClipEncoder": "preprocessing",
    "LatentDataset": "shards",
    "LatentLoader": "loader",
    "ShardRows": "shard_rows",
    "ShardWriter": "shards",
    "StoredNegative": "shards",
    "TrajectoryFolder": "trajectories",
    "preprocess": "preprocessing",
}

__all__ = [
    "CachedConditioning",
    "ClipEncoder",
    "ConditioningConfig",
    "DataConfig",
    "DatasetIndex",
    "DatasetInfo",
    "LatentDataset",
    "LatentLoader",
    "ShardEntry",
    "ShardRows",
    "ShardWriter",
    "StoredNegative",
    "TrajectoryFolder",
    "dataset_info",
    "preprocess",
]

__getattr__ = lazy_exports(__name__, _LAZY)
