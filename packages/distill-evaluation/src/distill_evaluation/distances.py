"""Distances of samples from real clips that no setting was tuned by.

The judge's Frechet distance is of 32 features that were learned for a task; settings that were
chosen by it may be worse in what it does not see, the spread of latents for one. These are of plain
principal components, and of numbers that need no judge.
"""

from __future__ import annotations

from pathlib import Path

import attrs
import torch
from distill_protocols import DataError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from distill_evaluation.metrics import (
    FeatureStatistics,
    Whitening,
    feature_statistics,
    fit_whitening,
    frechet_distance,
    motion_features,
)

PIXEL_COMPONENTS, LATENT_COMPONENTS = 48, 64


@attrs.frozen(kw_only=True)
class Distances:
    """How far samples are from real clips.

    Attributes:
        pixels: Frechet distance of pixels and their temporal differences, in 48 whitened principal
            components of real clips that went through the VAE.
        latents: Frechet distance of normalised latents, in 64 whitened principal components.
        latent_std: standard deviation of normalised latents over that of real ones: above 1 is
            over-dispersed (too sharp), below 1 too soft.
    """

    pixels: float
    latents: float
    latent_std: float


@attrs.frozen(kw_only=True, eq=False)
class DistanceReference:
    """Real clips, as their statistics: what samples are compared with.

    Attributes:
        count: how many they are.
        pixels, latents: the components, and the clips' own statistics in them.
        latent_std: of normalised latents.
    """

    count: int
    pixels: tuple[Whitening, FeatureStatistics]
    latents: tuple[Whitening, FeatureStatistics]
    latent_std: float

    @classmethod
    def of_clips(cls, clips: Tensor, latents: Tensor) -> DistanceReference:
        """Fit them to `clips [N, 3, F, H, W]` and normalised `latents [N, C, T, H, W]`.

        ValueError where they are too few for the components.
        """
        return cls(
            count=len(clips),
            pixels=_fit(motion_features(clips), PIXEL_COMPONENTS),
            latents=_fit(latents.flatten(1), LATENT_COMPONENTS),
            latent_std=float(latents.double().std()),
        )

    def features(self, clips: Tensor, latents: Tensor) -> Tensor:
        """Return what `distances` needs of samples, one row each: `[N, 48 + 64 + 2]`, float64."""
        flat = latents.flatten(1).double()
        parts = [
            torch.cat([self.pixels[0].apply(motion_features(part)) for part in clips.split(64)]),
            self.latents[0].apply(latents.flatten(1)),
            flat.mean(1, keepdim=True),
            flat.square().mean(1, keepdim=True),
        ]
        return torch.cat(parts, dim=1)

    def distances(self, features: Tensor) -> Distances:
        """Compare samples by their `features`."""
        pixels, latents, mean, square = features.split(
            [PIXEL_COMPONENTS, LATENT_COMPONENTS, 1, 1], dim=1
        )
        # Of all numbers together; their count makes no difference to it that could be seen.
        std = (square.mean() - mean.mean().square()).sqrt()
        return Distances(
            pixels=frechet_distance(feature_statistics(pixels), self.pixels[1]),
            latents=frechet_distance(feature_statistics(latents), self.latents[1]),
            latent_std=float(std) / self.latent_std,
        )


def _fit(features: Tensor, components: int) -> tuple[Whitening, FeatureStatistics]:
    whitening = fit_whitening(features, components)
    return whitening, feature_statistics(whitening.apply(features))


def read_real_latents(file: Path) -> Tensor:
    """Read latents [N, C, T, H, W] of real clips, as a data set holds them: not normalised."""
    try:
        return load_file(file)["latents"].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(
            f"{file} is no safetensors file with `latents` of real clips ({error}). Copy some of "
            "the data set's, as tools/tiny_study.py does."
        ) from error
