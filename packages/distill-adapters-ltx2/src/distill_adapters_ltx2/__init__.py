"""The LTX-2 family: load, adapt, sample, export.

Names that need torch are imported on first use: run files are checked without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

from distill_adapters_ltx2.config import LTX2PipelineConfig
from distill_adapters_ltx2.kind import LTX2
from distill_adapters_ltx2.plugin import PLUGIN, Ltx2Family
from distill_adapters_ltx2.published import PUBLISHED

if TYPE_CHECKING:
    from distill_adapters_ltx2.adapter import Ltx2Adapter
    from distill_adapters_ltx2.export import Ltx2Exporter

__all__ = [
    "LTX2",
    "PLUGIN",
    "PUBLISHED",
    "LTX2PipelineConfig",
    "Ltx2Adapter",
    "Ltx2Exporter",
    "Ltx2Family",
]

__getattr__ = lazy_exports(__name__, {"Ltx2Adapter": "adapter", "Ltx2Exporter": "export"})
