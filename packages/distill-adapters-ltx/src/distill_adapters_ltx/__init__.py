"""The LTX-Video family: load, adapt, sample, export.

Names that need torch are imported on first use: run files are checked without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

from distill_adapters_ltx.config import LTXPipelineConfig
from distill_adapters_ltx.kind import LTX
from distill_adapters_ltx.plugin import PLUGIN, LtxFamily
from distill_adapters_ltx.published import PUBLISHED

if TYPE_CHECKING:
    from distill_adapters_ltx.adapter import LtxAdapter
    from distill_adapters_ltx.export import LtxExporter

__all__ = [
    "LTX",
    "PLUGIN",
    "PUBLISHED",
    "LTXPipelineConfig",
    "LtxAdapter",
    "LtxExporter",
    "LtxFamily",
]

__getattr__ = lazy_exports(__name__, {"LtxAdapter": "adapter", "LtxExporter": "export"})
