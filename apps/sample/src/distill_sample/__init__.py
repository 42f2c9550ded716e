"""Samples clips from a run, a checkpoint or an exported student, beside its teacher.

::

    from distill_sample import open_model

    model = open_model("outputs/tiny-dmd2")
    clips = model.sample(["the digit three moving up"], seed=0)  # [1, 3, F, H_px, W_px] in [0, 1]

Names that need torch are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

from distill_sample.sources import SampleSource, read_sample_source

if TYPE_CHECKING:
    from distill_sample.model import Model, StreamedChunk, open_model

_LAZY = dict.fromkeys(["Model", "StreamedChunk", "open_model"], "model")

__all__ = ["Model", "SampleSource", "StreamedChunk", "open_model", "read_sample_source"]

__getattr__ = lazy_exports(__name__, _LAZY)
