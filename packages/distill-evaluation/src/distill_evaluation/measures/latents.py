"""Mean and standard deviation of latents: a drift of either is the first sign of a student that
loses or over-saturates its detail."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor


@attrs.frozen(eq=False)
class LatentMoments:
    """First and second moments of each clip's latents.

    Those of a clip do not depend on others, so ranks may compute their own, gather the rows and
    pool them.

    Attributes:
        means, squares: `[N, C]` float64, the mean of the latents and of their squares, by clip and
            channel.
    """

    means: Tensor
    squares: Tensor

    @classmethod
    def of_latents(cls, latents: Tensor) -> LatentMoments:
        """Compute them for `latents [N, C, T, H, W]`, N at least 1; ValueError for others."""
        if latents.ndim != 5 or not latents.numel():
            raise ValueError(
                f"latents of shape {tuple(latents.shape)}: [N, C, T, H, W] is needed, because "
                "channels are measured apart; add the batch, and let it hold a clip."
            )
        flat = latents.double().flatten(2)
        return cls(flat.mean(2), flat.square().mean(2))

    @property
    def mean(self) -> float:
        """The mean of all numbers."""
        return float(self.means.mean())

    @property
    def std(self) -> float:
        """The standard deviation of all numbers around their one mean."""
        variance = self.squares.mean() - self.means.mean().square()
        return float(variance.clamp_min(0).sqrt())

    @property
    def channel_means(self) -> Tensor:
        """The mean of each channel, `[C]`."""
        return self.means.mean(0)

    @property
    def channel_stds(self) -> Tensor:
        """The standard deviation of each channel, `[C]`."""
        variances = self.squares.mean(0) - self.means.mean(0).square()
        return variances.clamp_min(0).sqrt()

    @staticmethod
    def cat(parts: list[LatentMoments]) -> LatentMoments:
        """Join the rows of several."""
        return LatentMoments(
            torch.cat([part.means for part in parts]), torch.cat([part.squares for part in parts])
        )
