"""The page of a preview: one file, with its pictures in it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from distill_conditioning.writing import write_text
from distill_media import MediaError, encode_animation, scale_to_height

from distill_preprocess.shown import Shown

_SIDE = 240
_MOST_FRAMES = 48

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.2rem; }
article { border-top: 1px solid #8886; padding: 1rem 0; display: grid; gap: .3rem 1.5rem;
  grid-template-columns: max-content 1fr; align-items: start; }
figure { margin: 0; display: inline-block; }
figure + figure { margin-left: .5rem; }
figcaption, .facts { font-size: .85rem; opacity: .75; }
img { display: block; border-radius: 3px; }
.caption { margin: 0 0 .4rem; font-size: 1.05rem; }
.id { font-family: ui-monospace, monospace; font-size: .85rem; overflow-wrap: anywhere; }
ul { margin: .4rem 0 0; padding-left: 1.1rem; }
.note { color: #b45309; }
@media (prefers-color-scheme: dark) { .note { color: #fbbf24; } }
@media (max-width: 50rem) { article { grid-template-columns: 1fr; } }
"""


def write_page(
    path: Path, title: str, shown: Sequence[Shown], skipped: Sequence[MediaError]
) -> None:
    """Write the page; texts of files are escaped."""
    flagged = sum(bool(sample.notes) for sample in shown)
    bad = "".join(f"<li>{escape(str(error))}</li>" for error in skipped)
    parts = [
        "<!doctype html><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{escape(title)}</h1>",
        f"<p>Left: the clip as the VAE is given it. Right: what the VAE makes of it. "
        f"{flagged} of {len(shown)} samples have notes.</p>",
        f"<p>{len(skipped)} could not be used:</p><ul>{bad}</ul>" if skipped else "",
        *(_article(sample) for sample in shown),
    ]
    write_text(path, "\n".join(parts) + "\n")


def _article(sample: Shown) -> str:
    figures = "".join(
        f"<figure><img src='{_animation(frames)}' alt=''><figcaption>{name}</figcaption></figure>"
        for name, frames in (("source", sample.source), ("through the VAE", sample.decoded))
    )
    notes = "".join(f"<li class='note'>{escape(note)}</li>" for note in sample.notes)
    return (
        f"<article><div>{figures}</div><div>"
        f"<p class='caption'>{escape(sample.caption) or '<i>no caption</i>'}</p>"
        f"<div class='id'>{escape(sample.id)}</div>"
        f"<div class='facts'>{escape(sample.shape)} &middot; {sample.psnr:.1f} dB</div>"
        f"<ul>{notes}</ul></div></article>"
    )


def _animation(frames: np.ndarray) -> str:
    step = -(-len(frames) // _MOST_FRAMES)
    pictures = np.stack([scale_to_height(frame, _SIDE) for frame in frames[::step]])
    data = encode_animation(pictures, "WEBP", 8 / step, quality=90)
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"
