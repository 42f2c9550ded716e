"""The Qwen-Image family: load, adapt, sample, export.

Names that need torch are imported on first use: run files are checked without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

from distill_adapters_qwen_image.config import QwenImageConfig
from distill_adapters_qwen_image.kind import QWEN_IMAGE
from distill_adapters_qwen_image.plugin import PLUGIN, QwenImageFamily
from distill_adapters_qwen_image.published import PUBLISHED

if TYPE_CHECKING:
    from distill_adapters_qwen_image.adapter import QwenImageAdapter
    from distill_adapters_qwen_image.export import QwenImageExporter

__all__ = [
    "PLUGIN",
    "PUBLISHED",
    "QWEN_IMAGE",
    "QwenImageAdapter",
    "QwenImageConfig",
    "QwenImageExporter",
    "QwenImageFamily",
]

__getattr__ = lazy_exports(__name__, {"QwenImageAdapter": "adapter", "QwenImageExporter": "export"})
