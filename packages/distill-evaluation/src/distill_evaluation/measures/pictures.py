"""Sharpness, colour and contrast of clips. Clips are `[N, 3, F, H, W]` in [0, 1].

Each measure is taken frame by frame and averaged over the frames of a clip. None depends on a
reference: compare a student with its teacher, or with real clips.
"""

import torch
from torch import Tensor

RED, GREEN, BLUE = 0.299, 0.587, 0.114
"""Weights of brightness (luma), ITU-R BT.601."""


def check_clips(clips: Tensor) -> Tensor:
    """Return `clips [N, 3, F, H, W]` in fp32; ValueError for another shape."""
    if clips.ndim != 5 or clips.shape[1] != 3 or 0 in clips.shape[2:]:
        raise ValueError(
            f"clips of shape {tuple(clips.shape)}: [N, 3, F, H, W] in [0, 1] is needed, because "
            "colours and frames are measured apart; decode latents first, and add the batch."
        )
    return clips.float()


def luma(clips: Tensor) -> Tensor:
    """Compute the brightness `[N, F, H, W]` in [0, 1] of RGB clips (ITU-R BT.601)."""
    red, green, blue = check_clips(clips).unbind(1)
    return RED * red + GREEN * green + BLUE * blue


def sharpness(clips: Tensor) -> Tensor:
    """Measure the variance of the Laplacian of brightness, `[N]`; it falls with blur.

    The Laplacian is that of 4 neighbours, without padding (Pech-Pacheco et al. 2000, "Diatom
    autofocusing in brightfield microscopy"). Noise raises it too. ValueError for frames smaller
    than 4 x 4.
    """
    grey = luma(clips)
    if min(grey.shape[-2:]) < 4:
        raise ValueError(
            f"frames of {tuple(grey.shape[-2:])} pixels: at least 4 x 4 are needed, because the "
            "Laplacian takes the neighbours of a pixel; measure larger clips."
        )
    middle = grey[..., 1:-1, 1:-1]
    neighbours = (
        grey[..., :-2, 1:-1] + grey[..., 2:, 1:-1] + grey[..., 1:-1, :-2] + grey[..., 1:-1, 2:]
    )
    return (neighbours - 4 * middle).flatten(2).var(-1).mean(1)


def saturation(clips: Tensor) -> Tensor:
    """Measure how pure the colours are, `[N]` in [0, 1]: 0 is grey.

    The saturation of HSV, (max - min) / max over the three colours, with the pixels weighted by
    their max: nearly black ones, whose hue is noise, would count as pure colours otherwise.
    """
    high, low = check_clips(clips).amax(1), check_clips(clips).amin(1)
    return (high - low).flatten(1).mean(1) / high.flatten(1).mean(1).clamp_min(1e-6)


def colourfulness(clips: Tensor) -> Tensor:
    """Measure colourfulness, `[N]`: 0 is grey, 0.2 moderate, above 0.4 very colourful.

    sqrt(var(rg) + var(yb)) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2) with rg = R - G and
    yb = (R + G) / 2 - B (Hasler and Suesstrunk 2003, "Measuring colourfulness in natural images",
    whose scale is 255 times this one).
    """
    red, green, blue = check_clips(clips).flatten(3).unbind(1)
    rg, yb = red - green, (red + green) / 2 - blue
    spread = (rg.var(-1, correction=0) + yb.var(-1, correction=0)).sqrt()
    shift = (rg.mean(-1).square() + yb.mean(-1).square()).sqrt()
    return (spread + 0.3 * shift).mean(1)


def contrast(clips: Tensor) -> Tensor:
    """Measure the standard deviation of brightness within a frame, `[N]` in [0, 0.5]: RMS contrast
    (Peli 1990, "Contrast in complex images")."""
    return luma(clips).flatten(2).std(-1, correction=0).mean(1)


def clipped_share(clips: Tensor) -> Tensor:
    """Compute the share of colour values that are black or white to within 1 / 255, `[N]`.

    It rises where guidance drives values out of range and the decoder's clamp cuts them off.
    """
    values = check_clips(clips).flatten(1)
    return ((values <= 1 / 255) | (values >= 254 / 255)).float().mean(1)


def blur(frames: Tensor, kernel: Tensor) -> Tensor:
    """Filter `frames [..., H, W]` by a separable kernel `[K]`, without padding:
    `[..., H - K + 1, W - K + 1]`."""
    # Sums of shifted frames: a convolution of one channel is ten times slower on a CPU.
    for dim in (-2, -1):
        size = frames.shape[dim] - len(kernel) + 1
        total = frames.narrow(dim, 0, size) * kernel[0]
        for offset in range(1, len(kernel)):
            total.addcmul_(frames.narrow(dim, offset, size), kernel[offset])
        frames = total
    return frames


def gaussian(size: int, sigma: float, device: torch.device) -> Tensor:
    """Compute a Gaussian kernel `[size]` whose sum is 1."""
    offsets = torch.arange(size, device=device, dtype=torch.float32) - (size - 1) / 2
    weights = (-offsets.square() / (2 * sigma**2)).exp()
    return weights / weights.sum()
