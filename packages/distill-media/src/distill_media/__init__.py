"""From videos, pictures and captions as people keep them to clips of a model's shape, and back to
files and pictures for people.

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
        read_last_frames,
    )
    from distill_media.drawing.encoding import (
        Mp4Writer,
        clips_to_gif,
        encode_animation,
        encode_mp4,
        read_mp4,
        write_mp4,
    )
    from distill_media.drawing.lettering import Lettering
    from distill_media.drawing.reading import Animation, read_animation
    from distill_media.drawing.scaling import enlarge, scale_to_height, shrink, side_by_side
    from distill_media.drawing.sheets import (
        SheetRow,
        caption_clips,
        draw_contact_sheet,
        draw_sheet_film,
        spread_frames,
        write_contact_sheet,
        write_sheet_gif,
        write_sheet_mp4,
    )
    from distill_media.inspection import find_notes
    from distill_media.stored import (
        STORED_TEXT,
        StoredReader,
        StoredSample,
        TrajectoryReader,
        items_of_trajectories,
    )

__all__ = [
    "STORED_TEXT",
    "Animation",
    "CaptionsConfig",
    "ClipShape",
    "CutConfig",
    "Lettering",
    "MediaClip",
    "MediaError",
    "MediaItem",
    "MediaPlace",
    "Mp4Writer",
    "NoBucketError",
    "PlannedClip",
    "SheetRow",
    "SourceConfig",
    "StoredReader",
    "StoredSample",
    "TrajectoryReader",
    "caption_clips",
    "choose_bucket",
    "clips_to_gif",
    "decode_clips",
    "draw_contact_sheet",
    "draw_sheet_film",
    "encode_animation",
    "encode_mp4",
    "enlarge",
    "find_notes",
    "group_clips",
    "items_of_trajectories",
    "plan_clips",
    "read_animation",
    "read_clips",
    "read_items",
    "read_last_frames",
    "read_mp4",
    "read_scene_cuts",
    "scale_to_height",
    "shrink",
    "side_by_side",
    "spread_frames",
    "write_contact_sheet",
    "write_mp4",
    "write_sheet_gif",
    "write_sheet_mp4",
]

_LAZY = {
    **dict.fromkeys(
        [
            "MediaClip",
            "PlannedClip",
            "decode_clips",
            "group_clips",
            "plan_clips",
            "read_clips",
            "read_last_frames",
        ],
        "clips",
    ),
    **dict.fromkeys(
        ["Mp4Writer", "clips_to_gif", "encode_animation", "encode_mp4", "read_mp4", "write_mp4"],
        "drawing.encoding",
    ),
    "Lettering": "drawing.lettering",
    **dict.fromkeys(["Animation", "read_animation"], "drawing.reading"),
    **dict.fromkeys(["enlarge", "scale_to_height", "shrink", "side_by_side"], "drawing.scaling"),
    **dict.fromkeys(
        [
            "SheetRow",
            "caption_clips",
            "draw_contact_sheet",
            "draw_sheet_film",
            "spread_frames",
            "write_contact_sheet",
            "write_sheet_gif",
            "write_sheet_mp4",
        ],
        "drawing.sheets",
    ),
    "find_notes": "inspection",
    **dict.fromkeys(
        [
            "STORED_TEXT",
            "StoredReader",
            "StoredSample",
            "TrajectoryReader",
            "items_of_trajectories",
        ],
        "stored",
    ),
}

__getattr__ = lazy_exports(__name__, _LAZY)
