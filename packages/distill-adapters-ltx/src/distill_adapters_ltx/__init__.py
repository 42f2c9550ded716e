"""The LTX-Video family: load, adapt, sample, export.

Names that need torch are imported on first use: run files are checked without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

from distill_adapters_ltx.config import LTXPipelineConfig
from distill_adapters_ltx.kind import LTX
from distill_adapters_ltx.plugin import PLUGIN, LtxFamily
from distill_adapters_ltx.published import LATENT_CHANNELS, PUBLISHED, STRIDE_HW, STRIDE_T

if TYPE_CHECKING:
    from distill_adapters_ltx.adapter import LtxAdapter
    from distill_adapters_ltx.export import LtxExporter
    from distill_adapters_ltx.guidance import rescale_guidance
    from distill_adapters_ltx.latents import denormalize, normalize
    from distill_adapters_ltx.packing import pack, unpack
    from distill_adapters_ltx.positions import token_positions

_LAZY = {
    "LtxAdapter": "adapter",
    "LtxExporter": "export",
    "denormalize": "latents",
    "normalize": "latents",
    "pack": "packing",
    "rescale_guidance": "guidance",
    "token_positions": "positions",
    "unpack": "packing",
}

__all__ = [
    "LATENT_CHANNELS",
    "LTX",
    "PLUGIN",
    "PUBLISHED",
    "STRIDE_HW",
    "STRIDE_T",
    "LTXPipelineConfig",
    "LtxAdapter",
    "LtxExporter",
    "LtxFamily",
    "denormalize",
    "normalize",
    "pack",
    "rescale_guidance",
    "token_positions",
    "unpack",
]

__getattr__ = lazy_exports(__name__, _LAZY)
