"""Latent data sets, loaders and the negative condition.

Names that need torch are imported on first use: run files are checked before torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from distill_conditioning.config import ConditioningConfig, DataConfig
from distill_conditioning.facts import DatasetFacts, dataset_facts
from distill_conditioning.index import DatasetIndex, ShardEntry

if TYPE_CHECKING:
    from distill_conditioning.loader import LatentLoader
    from distill_conditioning.preprocessing import ClipEncoder, preprocess
    from distill_conditioning.provider import CachedConditioning
    from distill_conditioning.shards import LatentDataset, ShardWriter, StoredNegative

_LAZY = {
    "CachedConditioning": "provider",
    "ClipEncoder": "preprocessing",
    "LatentDataset": "shards",
    "LatentLoader": "loader",
    "ShardWriter": "shards",
    "StoredNegative": "shards",
    "preprocess": "preprocessing",
}

__all__ = [
    "CachedConditioning",
    "ClipEncoder",
    "ConditioningConfig",
    "DataConfig",
    "DatasetFacts",
    "DatasetIndex",
    "LatentDataset",
    "LatentLoader",
    "ShardEntry",
    "ShardWriter",
    "StoredNegative",
    "dataset_facts",
    "preprocess",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(f"distill_conditioning.{_LAZY[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
