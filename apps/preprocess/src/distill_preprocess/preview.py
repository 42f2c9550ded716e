"""A look at some samples before all are made: source, what the VAE gives back, caption, notes."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from distill_media import MediaClip, MediaError, MediaItem
from distill_protocols import DataError
from distill_runtime import Worker, to_uint8

from distill_preprocess.decoding import decode_ahead
from distill_preprocess.encoding import to_video
from distill_preprocess.page import write_page
from distill_preprocess.request import Request, buckets_of, cut_of, items_of, scene_cuts_of
from distill_preprocess.run import caption_notes, make_adapter
from distill_preprocess.sheet import write_sheet
from distill_preprocess.shown import Shown

_log = logging.getLogger(__name__)

PAGE, SHEET = "preview.html", "preview.png"
LOW_PSNR = 25.0
"""dB, below which what the VAE gives back is visibly not what it was given."""


@torch.no_grad()
def preview(config: Request, count: int, *, limit: int | None = None) -> None:
    """Write a page and a contact sheet of ``count`` samples, evenly spread over the sources.

    Raises:
        DistillError: whatever is wrong with sources or encoders; no sample could be made.
    """
    own = config.section
    if not own.has_clips:
        raise DataError(
            "the sources are prompts alone, latents or ODE pairs, and a preview shows clips. Look "
            "at the dry run"
        )
    items = items_of(config)[:limit]
    chosen = [items[round(n)] for n in np.linspace(0, len(items) - 1, min(count, len(items)))]
    device = Worker.of_this_process().device(None if own.device == "auto" else own.device)
    adapter = make_adapter(config, device)
    said = caption_notes(config, [caption for item in chosen for caption in item.captions])
    shown: list[Shown] = []
    skipped: list[MediaError] = []
    seen: set[str] = set()
    stream = decode_ahead(
        chosen,
        buckets_of(config),
        cut_of(config),
        scene_cuts=scene_cuts_of(config),
        workers=own.decode_workers,
        ahead=own.decode_ahead,
    )
    for decoded in stream:
        if isinstance(decoded.result, MediaError):
            skipped.append(decoded.result)
            _log.info("skipped %s", decoded.result)
        elif decoded.item.id not in seen:  # one clip of each video
            seen.add(decoded.item.id)
            video = to_video([decoded.result], torch.device("cpu"))
            latents = adapter.normalize_latents(adapter.encode(video))
            back = adapter.decode(latents).cpu()
            notes = [*decoded.notes, *(n for c in decoded.item.captions for n in said.get(c, ()))]
            shown.append(_show(decoded.item, decoded.result, video, back, notes))
            _log.info("%s: %.1f dB%s", shown[-1].id, shown[-1].psnr, _listed(shown[-1].notes))
    if not shown:
        raise DataError(f"none of {len(chosen)} items could be shown; the first: {skipped[0]}")
    folder = Path(own.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{config.recipe.family}, {config.source}: {len(shown)} of {len(items)} items"
    write_page(folder / PAGE, title, shown, skipped)
    write_sheet(folder / SHEET, shown)
    _log.info("%s and %s are in %s", PAGE, SHEET, folder)


def _show(
    item: MediaItem,
    clip: MediaClip,
    video: torch.Tensor,
    back: torch.Tensor,
    notes: Sequence[str],
) -> Shown:
    psnr = -10 * math.log10(max(float((video - back).square().mean()), 1e-10))
    low = [f"comes back from the VAE with {psnr:.1f} dB"] if psnr < LOW_PSNR else []
    return Shown(
        id=clip.id,
        caption=" | ".join(item.captions),
        shape=str(clip.shape),
        source=clip.frames,
        decoded=to_uint8(back[0]).numpy(),
        psnr=psnr,
        notes=tuple(dict.fromkeys([*notes, *low])),
    )


def _listed(notes: Sequence[str]) -> str:
    return f" ({'; '.join(notes)})" if notes else ""
