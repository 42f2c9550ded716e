"""The Z-Image family: load, adapt, sample, export.

Names that need torch are imported on first use: run files are checked without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

from distill_adapters_z_image.config import ZImageConfig
from distill_adapters_z_image.kind import Z_IMAGE
from distill_adapters_z_image.plugin import PLUGIN, ZImageFamily
from distill_adapters_z_image.published import PUBLISHED

if TYPE_CHECKING:
    from distill_adapters_z_image.adapter import ZImageAdapter
    from distill_adapters_z_image.export import ZImageExporter

__all__ = [
    "PLUGIN",
    "PUBLISHED",
    "Z_IMAGE",
    "ZImageAdapter",
    "ZImageConfig",
    "ZImageExporter",
    "ZImageFamily",
]

__getattr__ = lazy_exports(__name__, {"ZImageAdapter": "adapter", "ZImageExporter": "export"})
