"""What the packages of the framework share at run time.

Names that need torch are imported on first use: run files are checked before torch is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

from distill_runtime.file_names import path_inside, path_problem
from distill_runtime.files import (
    DELETED_PREFIX,
    FileInfo,
    export_folder_problem,
    files_below,
    make_readable,
    naming_file,
    open_file,
    publish_folder,
    remove_folder,
    replace_file,
    replace_folder,
    sha256_of_file,
    sync_file,
    sync_folder,
    sync_tree,
    write_new_file,
)
from distill_runtime.json_files import (
    UnreadableFileError,
    as_count,
    as_text,
    flatten,
    json_text,
    parse_json,
    read_bytes,
    read_json,
    read_json_object,
)
from distill_runtime.locks import FolderClaim, claim_folder, is_still_at, try_lock
from distill_runtime.plugins import GROUPS, load_plugin, plugin_names
from distill_runtime.printing import counted, printable, readable_bytes
from distill_runtime.safetensors_header import SafetensorsHeader, read_header

if TYPE_CHECKING:
    from distill_runtime.method import DistillMethod
    from distill_runtime.pixels import to_uint8
    from distill_runtime.processes import Worker, device_type, sigterm_as_interrupt
    from distill_runtime.ranks import ALONE, Ranks
    from distill_runtime.row_partition import RowPartition
    from distill_runtime.safetensors_files import (
        DTYPE_NAMES,
        DTYPES,
        file_layout,
        raw_bytes,
        write_safetensors,
    )
    from distill_runtime.shards import fetch_floats, full_tensor, is_sharded, local_shard

_LAZY = {
    "DistillMethod": "method",
    "to_uint8": "pixels",
    **dict.fromkeys(["Worker", "device_type", "sigterm_as_interrupt"], "processes"),
    **dict.fromkeys(["ALONE", "Ranks"], "ranks"),
    "RowPartition": "row_partition",
    **dict.fromkeys(
        ["DTYPES", "DTYPE_NAMES", "file_layout", "raw_bytes", "write_safetensors"],
        "safetensors_files",
    ),
    **dict.fromkeys(["fetch_floats", "full_tensor", "is_sharded", "local_shard"], "shards"),
}  # fmt: skip

__all__ = [
    "ALONE",
    "DELETED_PREFIX",
    "DTYPES",
    "DTYPE_NAMES",
    "GROUPS",
    "DistillMethod",
    "FileInfo",
    "FolderClaim",
    "Ranks",
    "RowPartition",
    "SafetensorsHeader",
    "UnreadableFileError",
    "Worker",
    "as_count",
    "as_text",
    "claim_folder",
    "counted",
    "device_type",
    "export_folder_problem",
    "fetch_floats",
    "file_layout",
    "files_below",
    "flatten",
    "full_tensor",
    "is_sharded",
    "is_still_at",
    "json_text",
    "load_plugin",
    "local_shard",
    "make_readable",
    "naming_file",
    "open_file",
    "parse_json",
    "path_inside",
    "path_problem",
    "plugin_names",
    "printable",
    "publish_folder",
    "raw_bytes",
    "read_bytes",
    "read_header",
    "read_json",
    "read_json_object",
    "readable_bytes",
    "remove_folder",
    "replace_file",
    "replace_folder",
    "sha256_of_file",
    "sigterm_as_interrupt",
    "sync_file",
    "sync_folder",
    "sync_tree",
    "to_uint8",
    "try_lock",
    "write_new_file",
    "write_safetensors",
]

__getattr__ = lazy_exports(__name__, _LAZY)
