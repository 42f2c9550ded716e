"""Motion in clips: differences of frames, and optical flow by Lucas and Kanade.

Clips are `[N, 3, F, H, W]` in [0, 1]. A clip of one frame has no motion: 0.
"""

import torch
from torch import Tensor
from torch.nn import functional

from distill_evaluation.measures.pictures import check_clips, luma

GRID = 64
"""Shortest side of the frames that flow is computed on; larger ones are averaged down to it."""
WINDOW = 7
"""Side of the square, in pixels of a level, whose pixels are taken to move alike."""
DAMPING = 1e-5
"""Added to both eigenvalues of the mean structure tensor, in brightness squared a pixel squared.
Where a window has less texture than that (even areas, noise of 1 / 255) the flow tends to 0."""
ITERATIONS = 3
"""Refinements on each level of the pyramid."""
SMALLEST = 12
"""Shortest side of the coarsest level: less than two windows of pixels show nothing."""


def frame_difference(clips: Tensor) -> Tensor:
    """Compute the mean absolute difference of neighbouring frames, `[N]`, in brightness a frame.

    It sees flicker and noise as motion too; `flow_magnitude` sees less of them.
    """
    clips = check_clips(clips)
    if clips.shape[2] == 1:
        return clips.new_zeros(len(clips))
    return clips.diff(dim=2).abs().flatten(1).mean(1)


def flow_magnitude(clips: Tensor) -> Tensor:
    """Measure the mean length of the optical flow, `[N]`, in pixels of the clip a frame.

    The mean is over all pixels and pairs of neighbouring frames, so that even backgrounds count as
    still. Flow is computed on brightness that is averaged down to `GRID` pixels a side.
    """
    grey = luma(clips)
    count, frames, height, width = grey.shape
    if frames == 1:
        return grey.new_zeros(count)
    scale = max(1.0, min(height, width) / GRID)
    if scale > 1:
        size = (round(height / scale), round(width / scale))
        grey = functional.interpolate(grey, size, mode="area")
    flow = optical_flow(grey[:, :-1].flatten(0, 1), grey[:, 1:].flatten(0, 1))
    return flow.norm(dim=1).mean((1, 2)).view(count, frames - 1).mean(1) * scale


def optical_flow(first: Tensor, second: Tensor) -> Tensor:
    """Estimate the flow `[N, 2, H, W]` (right, down; pixels) from `first` to `second [N, H, W]`.

    By Lucas and Kanade 1981, "An iterative image registration technique", on a pyramid with warping
    (Bouguet 2001): at each level the second frame is moved back by the flow so far, and the flow is
    the damped least-squares solution of I_x u + I_y v + I_t = 0 in a window around each pixel. It
    finds motion up to about a quarter of the shorter side.
    """
    one, other = first.unsqueeze(1), second.unsqueeze(1)
    levels = [(one, other)]
    while min(one.shape[-2:]) >= 2 * SMALLEST:
        one, other = (functional.avg_pool2d(x, 2, ceil_mode=True) for x in (one, other))
        levels.append((one, other))
    flow = first.new_zeros(len(first), 2, *one.shape[-2:])
    for one, other in reversed(levels):
        if flow.shape[-2:] != one.shape[-2:]:
            # A step of one pixel on the coarser level is one of two on this.
            flow = 2 * functional.interpolate(
                flow, one.shape[-2:], mode="bilinear", align_corners=False
            )
        for _ in range(ITERATIONS):
            flow = _lucas_kanade(one, _moved_back(other, flow), flow)
    return flow


def _lucas_kanade(one: Tensor, moved: Tensor, flow: Tensor) -> Tensor:
    """Solve for the flow `[N, 2, H, W]` from frames `[N, 1, H, W]` to others, which are given as
    `moved` back by `flow`."""
    padded = functional.pad((one + moved) / 2, (1, 1, 1, 1), mode="replicate")
    right = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    # The change that the whole flow explains, and not just what `flow` left over: its mean over a
    # window is of one flow then. With the rest alone, neighbours that were moved back by different
    # flows would be added up, and the iteration diverges.
    change = one - moved + right * flow[:, :1] + down * flow[:, 1:]
    products = [right * right, down * down, right * down, right * change, down * change]
    xx, yy, xy, xt, yt = _window_means(torch.cat(products, dim=1)).split(1, dim=1)
    xx, yy = xx + DAMPING, yy + DAMPING
    # Never 0: the undamped determinant is that of a mean of g g^T, which is positive semidefinite.
    determinant = xx * yy - xy * xy
    return torch.cat([yy * xt - xy * yt, xx * yt - xy * xt], dim=1) / determinant


def _window_means(values: Tensor) -> Tensor:
    """Average `values [N, C, H, W]` over the window around each place, cut off at the edges."""
    half = WINDOW // 2
    rows = functional.avg_pool2d(values, (WINDOW, 1), 1, (half, 0), count_include_pad=False)
    return functional.avg_pool2d(rows, (1, WINDOW), 1, (0, half), count_include_pad=False)


def _moved_back(frames: Tensor, flow: Tensor) -> Tensor:
    """Take `frames [N, 1, H, W]` at each place plus `flow [N, 2, H, W]`, bilinearly."""
    height, width = frames.shape[-2:]
    rows = torch.arange(height, device=frames.device, dtype=frames.dtype)
    columns = torch.arange(width, device=frames.device, dtype=frames.dtype)
    x, y = columns + flow[:, 0], rows[:, None] + flow[:, 1]
    # grid_sample's coordinates run from -1 to 1 over the outer edges of the pixels.
    places = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    return functional.grid_sample(
        frames, places, mode="bilinear", padding_mode="border", align_corners=False
    )
