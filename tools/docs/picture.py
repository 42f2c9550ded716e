"""The picture of the README: what the tiny run's teacher and student make of ten prompts.

The prompts were chosen before anything was sampled: each digit once, directions in turn. Clip n is
that of seed n, for teacher and student alike, and no clip was left out or sampled again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = ("right", "up", "left", "down")
PROMPTS = tuple(
    f"the digit {digit} moving {DIRECTIONS[n % len(DIRECTIONS)]}" for n, digit in enumerate(DIGITS)
)
COLUMNS = 5
FPS = 6
HELD = 4
"""Times that the last frame is shown."""


def make_picture(run: Path, to: Path) -> None:
    """Sample teacher and student (EMA) of a finished run, and write them side by side as WebP."""
    import torch
    from distill_media import encode_animation
    from distill_protocols import SamplerSpec
    from distill_runtime import replace_file, to_uint8
    from distill_sample import open_model

    torch.set_num_threads(1)
    sampler = SamplerSpec(steps=32, shift=3.0, guidance=1.5)
    model = open_model(run, weights="ema", also=["teacher"], samplers={"teacher": sampler})
    rows = {
        "teacher\n32 steps\n64 calls": to_uint8(
            model.sample(PROMPTS, role="teacher", batch=10)
        ).numpy(),
        "student\n2 steps\n2 calls": to_uint8(model.sample(PROMPTS, batch=10)).numpy(),
    }
    frames = draw_frames(rows, PROMPTS)
    moving = np.concatenate([frames, np.repeat(frames[-1:], HELD, 0)])
    with replace_file(to) as staging:
        staging.write_bytes(encode_animation(moving, "WEBP", FPS, quality=70))


def draw_frames(rows: dict[str, np.ndarray], prompts: tuple[str, ...]) -> np.ndarray:
    """Draw clips [N, T, H, W, 3] as bands of ``COLUMNS`` prompts below each other, [T, h, w, 3]."""
    from distill_media import SheetRow, draw_contact_sheet

    count = next(iter(rows.values())).shape[1]
    pages = []
    for now in range(count):
        bands = [
            draw_contact_sheet(
                [
                    SheetRow(label, clips[start : start + COLUMNS, now : now + 1])
                    for label, clips in rows.items()
                ],
                prompts[start : start + COLUMNS],
                frames_shown=1,
                frame_side=128,
            )
            for start in range(0, len(prompts), COLUMNS)
        ]
        pages.append(np.concatenate(bands))
    return np.stack(pages)
