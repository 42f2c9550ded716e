"""From videos, pictures and captions as people keep them to clips of a model's shape.

Names that need PyAV and numpy are imported on first use: files are checked before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

from distill_media.buckets import ClipShape, NoBucketError, choose_bucket
from distill_media.config import CaptionsConfig, CutConfig, SourceConfig
from distill_media.errors import MediaError
from distill_media.items import MediaItem, MediaPlace
from distill_media.scene_cuts import read_scene_cuts
from distill_media.sources import read_items

if TYPE_CHECKING:
    from distill_media.clips import (
        MediaClip,
        PlannedClip,
        decode_clips,
        group_clips,
        plan_clips,
        read_clips,
    )
    from distill_media.inspection import find_notes
    from distill_media.stored import StoredReader, StoredSample

__all__ = [
    "CaptionsConfig",
    "ClipShape",
    "CutConfig",
    "MediaClip",
    "MediaError",
    "MediaItem",
    "MediaPlace",
    "NoBucketError",
    "PlannedClip",
    "SourceConfig",
    "StoredReader",
    "StoredSample",
    "choose_bucket",
    "decode_clips",
    "find_notes",
    "group_clips",
    "plan_clips",
    "read_clips",
    "read_items",
    "read_scene_cuts",
]

_LAZY = {
    **dict.fromkeys(
        ["MediaClip", "PlannedClip", "decode_clips", "group_clips", "plan_clips", "read_clips"],
        "clips",
    ),
    "find_notes": "inspection",
    **dict.fromkeys(["StoredReader", "StoredSample"], "stored"),
}

__getattr__ = lazy_exports(__name__, _LAZY)
