"""Measures of clips and latents: pure functions of tensors, one number a clip.

Clips are `[N, 3, F, H, W]` in [0, 1], RGB; latents are `[N, C, T, H, W]`. A clip's number does not
depend on the other clips of its batch, so ranks may measure their own clips and share the numbers.
Everything is computed in fp32 on the device of the input, without randomness. Each function
expects finite values, and raises ValueError for another shape.

| measure | function | unit |
|---|---|---|
| motion | `frame_difference`, `flow_magnitude` | brightness a frame; pixels a frame |
| sharpness | `sharpness` | brightness squared |
| colour | `saturation`, `colourfulness` | share; brightness |
| contrast | `contrast`, `clipped_share` | brightness; share |
| variety | `pair_distances` | that of the values |
| likeness | `psnr`, `ssim` | dB; 1 is equal |
| latents | `LatentMoments` | that of the latents |
"""

from distill_evaluation.measures.latents import LatentMoments
from distill_evaluation.measures.likeness import psnr, ssim
from distill_evaluation.measures.motion import flow_magnitude, frame_difference, optical_flow
from distill_evaluation.measures.pictures import (
    clipped_share,
    colourfulness,
    contrast,
    luma,
    saturation,
    sharpness,
)
from distill_evaluation.measures.variety import pair_distances

__all__ = [
    "LatentMoments",
    "clipped_share",
    "colourfulness",
    "contrast",
    "flow_magnitude",
    "frame_difference",
    "luma",
    "optical_flow",
    "pair_distances",
    "psnr",
    "saturation",
    "sharpness",
    "ssim",
]
