"""The LongCat-Video family: its transformer, and load, adapt, sample, export.

Names that need torch are imported on first use: run files are checked without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

from distill_adapters_longcat.config import LongCatPipelineConfig
from distill_adapters_longcat.kind import LONGCAT
from distill_adapters_longcat.plugin import PLUGIN, LongCatFamily
from distill_adapters_longcat.published import PUBLISHED

if TYPE_CHECKING:
    from distill_adapters_longcat.adapter import LongCatAdapter
    from distill_adapters_longcat.export import LongCatExporter
    from distill_adapters_longcat.transformer import LongCatVideoTransformer3DModel

__all__ = [
    "LONGCAT",
    "PLUGIN",
    "PUBLISHED",
    "LongCatAdapter",
    "LongCatExporter",
    "LongCatFamily",
    "LongCatPipelineConfig",
    "LongCatVideoTransformer3DModel",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "LongCatAdapter": "adapter",
        "LongCatExporter": "export",
        "LongCatVideoTransformer3DModel": "transformer",
    },
)
