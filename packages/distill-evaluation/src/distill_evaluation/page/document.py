"""The page as HTML: one file that loads nothing from anywhere.

All text from files is escaped; and should that ever fail, the page's own policy lets no script run
but ours, whose hash it states, and lets nothing be fetched.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from attrs import field, frozen
from distill_runtime import counted, readable_bytes, replace_file

from distill_evaluation.page import sections
from distill_evaluation.page.clips import (
    ClipPlace,
    ClipStore,
    EmbeddedClip,
    PromptClips,
    find_clips,
)
from distill_evaluation.page.runs import RunFolder
from distill_evaluation.page.sections import Html, text
from distill_evaluation.page.series import DRAWN_POINTS, Panel, make_panels

MOST_PAGE_BYTES = 28_000_000
"""Of the whole file; pages are mailed and opened on phones."""
MOST_CLIPS = 240
_COLOURS = 8


@frozen(kw_only=True)
class PageInfo:
    """What was written.

    Attributes:
        path: of the file.
        size: bytes.
        clips: that are in it.
        left_out: clips that are not, because of the page's size or because they cannot be read.
        problems: what could not be read.
    """

    path: Path
    size: int
    clips: int
    left_out: int
    problems: tuple[str, ...] = field(factory=tuple)


def write_page(
    runs: Sequence[RunFolder], path: Path | str, *, store: ClipStore | None = None
) -> PageInfo:
    """Write the page of one run, or of several to compare them.

    Args:
        store: of an earlier call: clips that have not changed since are not encoded again.

    Raises:
        ValueError: there is no run.
        OSError: the file cannot be written.
    """
    if not runs:
        raise ValueError("a page of no run: give at least one")
    store = store or ClipStore()
    panels = make_panels([run.metrics for run in runs])
    data = _data(panels, runs)
    prompts = [find_clips(run) for run in runs]
    wanted = list(dict.fromkeys(_by_importance(prompts)))
    budget = MOST_PAGE_BYTES - len(data) - 400_000
    clips = store.embed(wanted[:MOST_CLIPS], budget)
    problems = tuple(
        f"{run.name}: {problem}" if len(runs) > 1 else problem
        for run in runs
        for problem in run.problems
    )
    left_out = len(wanted) - len(clips)
    parts = [
        sections.header(runs),
        "<main>",
        sections.problems(problems),
        sections.alarms(runs),
        sections.clips(runs, prompts, clips, left_out),
        sections.curves(panels),
        sections.quality(runs),
        sections.times(runs),
        sections.environment(runs),
        sections.run_files(runs),
        "</main>",
        _footer(panels, clips),
    ]
    html = _document(_title(runs), "".join(parts), data)
    with replace_file(path) as part:
        part.write_text(html, encoding="utf-8")
    return PageInfo(
        path=Path(path),
        size=len(html.encode()),
        clips=len(clips),
        left_out=left_out,
        problems=problems,
    )


def _by_importance(runs: Sequence[Sequence[PromptClips]]) -> list[ClipPlace]:
    """List all clips: those of reports, views that stay, then validations, the newest first."""
    rows = [row for prompts in runs for row in prompts]
    places = [place for row in rows for place in (*row.finals.values(), *row.frozen.values())]
    places += [row.predicted[1] for row in rows if row.predicted is not None]
    dated = [
        (iteration, place)
        for row in rows
        for strip in row.strips
        for iteration, place in strip.clips.items()
    ]
    return places + [place for _, place in sorted(dated, key=lambda pair: -pair[0])]


def _data(panels: Sequence[Panel], runs: Sequence[RunFolder]) -> str:
    """Return what the script draws, as JSON that cannot end its element."""
    several = len(runs) > 1
    content = {
        "alarms": sorted({alarm.iteration for alarm in runs[0].alarms or ()})
        if not several
        else [],
        "panels": [
            {
                "title": panel.title,
                "curves": [
                    {
                        "label": sections.curve_label(panel, curve, runs),
                        "colour": (curve.run if several else number) % _COLOURS,
                        "dash": _place_in_run(panel, number) if several else number // _COLOURS,
                        "x": curve.x,
                        "y": curve.y,
                    }
                    for number, curve in enumerate(panel.curves)
                ],
            }
            for panel in panels
        ],
    }
    encoded = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return encoded.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _place_in_run(panel: Panel, number: int) -> int:
    own = panel.curves[number].run
    return sum(curve.run == own for curve in panel.curves[:number])


def _title(runs: Sequence[RunFolder]) -> str:
    if len(runs) == 1:
        return runs[0].name
    return f"{len(runs)} runs: {', '.join(run.name for run in runs)}"


def _document(title: str, body: Html, data: str) -> str:
    assets = files("distill_evaluation.page") / "assets"
    style = (assets / "page.css").read_text("utf-8")
    script = (assets / "page.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; media-src data:; base-uri 'none'; form-action 'none'"
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            '<meta name="color-scheme" content="light dark">',
            # An icon of its own, or a browser would ask the server of the page for one.
            '<link rel="icon" href="data:,">',
            f"<title>{text(title)}</title>",
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            body,
            f'<script type="application/json" id="data">{data}</script>',
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _footer(panels: Sequence[Panel], clips: dict[ClipPlace, EmbeddedClip]) -> Html:
    longest = max((curve.points for panel in panels for curve in panel.curves), default=0)
    thinned = (
        f" Curves have up to {longest:,} points; those of more than {DRAWN_POINTS} are drawn by "
        "the lowest and the highest value of each stretch."
        if longest > DRAWN_POINTS
        else ""
    )
    size = readable_bytes(sum(clip.size for clip in clips.values()))
    now = datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M")
    return (
        f"<footer><p>Written {now}, with {counted(len(clips), 'clip')} ({size}). This file is "
        f"complete: it loads nothing from anywhere.{thinned}</p></footer>"
    )
