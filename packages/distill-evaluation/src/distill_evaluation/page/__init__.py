"""The page of a run: what was run, how it went and what came of it, in one HTML file.

Reads what runs write into their output folders, of any release, also half-written or damaged. No
torch here, and names that need numpy are imported on first use.
"""

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

if TYPE_CHECKING:
    from distill_evaluation.page.document import PageInfo, write_page
    from distill_evaluation.page.runs import RunFolder, is_run_folder, read_run

__all__ = ["PageInfo", "RunFolder", "is_run_folder", "read_run", "write_page"]

_LAZY = {
    **dict.fromkeys(["PageInfo", "write_page"], "document"),
    **dict.fromkeys(["RunFolder", "is_run_folder", "read_run"], "runs"),
}

__getattr__ = lazy_exports(__name__, _LAZY)
