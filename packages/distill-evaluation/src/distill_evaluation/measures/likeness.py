"""How like two clips are, as a student's and its teacher's of the same prompt and noise.

Clips are `[N, 3, F, H, W]` in [0, 1]; the first of one batch is compared with the first of the
other.
"""

import torch
from torch import Tensor

from distill_evaluation.measures.pictures import blur, check_clips, gaussian

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def psnr(clips: Tensor, references: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of each clip, `[N]` in dB; equal clips have 100.

    10 log10(1 / mse) over all pixels, colours and frames of a clip.
    """
    first, second = _check_pair(clips, references)
    mse = (first - second).square().flatten(1).mean(1)
    return -10 * mse.clamp_min(1e-10).log10()


def ssim(clips: Tensor, references: Tensor) -> Tensor:
    """Compute the structural similarity of each clip, `[N]`; 1 is equal.

    Wang et al. 2004, "Image quality assessment", equation 13: a Gaussian window of 11 pixels with
    sigma 1.5, K1 = 0.01, K2 = 0.03, no padding; the mean over places, colours and frames.
    ValueError for frames smaller than 11 x 11.
    """
    first, second = _check_pair(clips, references)
    if min(first.shape[-2:]) < WINDOW:
        raise ValueError(
            f"frames of {tuple(first.shape[-2:])} pixels: at least {WINDOW} x {WINDOW} are needed, "
            "because that is the window of SSIM; compare larger clips, or take psnr."
        )
    kernel = gaussian(WINDOW, SIGMA, first.device)
    frames = zip(
        first.unbind(2), second.unbind(2), strict=True
    )  # each by itself: five times memory
    return torch.stack([_frame_ssim(one, other, kernel) for one, other in frames]).mean(0)


def _frame_ssim(first: Tensor, second: Tensor, kernel: Tensor) -> Tensor:
    """Compute SSIM `[N]` of frames `[N, 3, H, W]`."""
    mean1, mean2 = blur(first, kernel), blur(second, kernel)
    var1 = blur(first * first, kernel) - mean1.square()
    var2 = blur(second * second, kernel) - mean2.square()
    covariance = blur(first * second, kernel) - mean1 * mean2
    c1, c2 = K1**2, K2**2
    likeness = (2 * mean1 * mean2 + c1) * (2 * covariance + c2)
    return (likeness / ((mean1.square() + mean2.square() + c1) * (var1 + var2 + c2))).mean(
        (1, 2, 3)
    )


def _check_pair(clips: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    if clips.shape != references.shape:
        raise ValueError(
            f"clips of shape {tuple(clips.shape)} against {tuple(references.shape)}: both must "
            "have one shape, because they are compared pixel by pixel; sample both from the same "
            "prompts and noise."
        )
    return check_clips(clips), check_clips(references)
