"""The Wan family: load, adapt, sample, export.

Names that need torch are imported on first use: run files are checked without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

from distill_adapters_wan.causal.config import CausalConfig
from distill_adapters_wan.config import WanPipelineConfig
from distill_adapters_wan.plugin import PLUGIN, WanFamily
from distill_adapters_wan.published import PUBLISHED, LatentFacts, PublishedModel

if TYPE_CHECKING:
    from distill_adapters_wan.adapter import WanAdapter
    from distill_adapters_wan.export.exporter import WanExporter

_LAZY = {
    "WanAdapter": "adapter",
    "WanExporter": "export.exporter",
    "load_bundle": "loading",
    "load_module": "loading",
    "load_role": "loading",
    "StockSchedule": "scheduler",
    "stock_schedule": "scheduler",
}

__all__ = [
    "PLUGIN",
    "PUBLISHED",
    "CausalConfig",
    "LatentFacts",
    "PublishedModel",
    "StockSchedule",
    "WanAdapter",
    "WanExporter",
    "WanFamily",
    "WanPipelineConfig",
    "load_bundle",
    "load_module",
    "load_role",
    "stock_schedule",
]

__getattr__ = lazy_exports(__name__, _LAZY)
