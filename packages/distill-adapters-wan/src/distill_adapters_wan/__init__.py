"""The Wan family: load, adapt, sample, export.

Names that need torch are imported on first use: run files are checked without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

from distill_adapters_wan.causal.config import CausalConfig
from distill_adapters_wan.config import WanPipelineConfig
from distill_adapters_wan.kind import WAN
from distill_adapters_wan.plugin import PLUGIN, WanFamily
from distill_adapters_wan.published import PUBLISHED

if TYPE_CHECKING:
    from distill_adapters_wan.adapter import WanAdapter
    from distill_adapters_wan.export.exporter import WanExporter

_LAZY = {"WanAdapter": "adapter", "WanExporter": "export.exporter"}

__all__ = [
    "PLUGIN",
    "PUBLISHED",
    "WAN",
    "CausalConfig",
    "WanAdapter",
    "WanExporter",
    "WanFamily",
    "WanPipelineConfig",
]

__getattr__ = lazy_exports(__name__, _LAZY)
