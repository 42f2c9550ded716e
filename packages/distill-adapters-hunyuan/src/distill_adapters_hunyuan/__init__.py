"""HunyuanVideo and HunyuanVideo 1.5: load, adapt, sample, export.

Names that need torch are imported on first use: run files are checked without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

from distill_adapters_hunyuan.video.config import HunyuanVideoConfig
from distill_adapters_hunyuan.video.plugin import PLUGIN as HUNYUAN_VIDEO_PLUGIN
from distill_adapters_hunyuan.video.plugin import HunyuanVideoFamily
from distill_adapters_hunyuan.video15.config import HunyuanVideo15Config
from distill_adapters_hunyuan.video15.plugin import PLUGIN as HUNYUAN_VIDEO15_PLUGIN
from distill_adapters_hunyuan.video15.plugin import HunyuanVideo15Family

if TYPE_CHECKING:
    from distill_adapters_hunyuan.video.adapter import HunyuanVideoAdapter
    from distill_adapters_hunyuan.video.export import HunyuanVideoExporter
    from distill_adapters_hunyuan.video15.adapter import HunyuanVideo15Adapter
    from distill_adapters_hunyuan.video15.export import HunyuanVideo15Exporter

__all__ = [
    "HUNYUAN_VIDEO15_PLUGIN",
    "HUNYUAN_VIDEO_PLUGIN",
    "HunyuanVideo15Adapter",
    "HunyuanVideo15Config",
    "HunyuanVideo15Exporter",
    "HunyuanVideo15Family",
    "HunyuanVideoAdapter",
    "HunyuanVideoConfig",
    "HunyuanVideoExporter",
    "HunyuanVideoFamily",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "HunyuanVideoAdapter": "video.adapter",
        "HunyuanVideoExporter": "video.export",
        "HunyuanVideo15Adapter": "video15.adapter",
        "HunyuanVideo15Exporter": "video15.export",
    },
)
