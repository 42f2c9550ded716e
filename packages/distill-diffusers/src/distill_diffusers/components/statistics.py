"""Mean and standard deviation of a VAE's raw latents, and where diffusers keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from attrs import frozen
from distill_protocols import WeightsError
from torch import Tensor

from distill_diffusers.calls import flow
from distill_diffusers.folders import fetch
from distill_diffusers.model_configs import read_config, read_number
from distill_diffusers.weights.sources import module_weights

_NAMES = ("latents_mean", "latents_std")


@frozen(kw_only=True, eq=False)
class LatentStatistics:
    """Mean and standard deviation of raw latents, each [1, C, 1, 1, 1] fp32.

    A VAE with a scaling factor f alone has mean 0 and std 1 / f; one that shifts by m too has mean
    m (SD 3: ``(z - shift_factor) * scaling_factor``).

    Raises:
        WeightsError: a number is not finite, or a deviation not above 0: latents divided by it
            would be of no use.
    """

    mean: Tensor
    std: Tensor

    def __attrs_post_init__(self) -> None:
        if self.mean.is_meta:  # those of a plan, which have no values
            return
        if not (self.mean.isfinite().all() and self.std.isfinite().all() and (self.std > 0).all()):
            raise WeightsError(
                f"the statistics of latents are mean {self.mean.flatten().tolist()} and standard "
                f"deviation {self.std.flatten().tolist()}; all must be finite, and deviations "
                "above 0, as latents are divided by them. Use the VAE's own"
            )

    @classmethod
    def of_channels(cls, mean: Sequence[float], std: Sequence[float]) -> LatentStatistics:
        """Build them from one number a channel."""
        shape = (1, -1, 1, 1, 1)
        return cls(mean=torch.tensor(mean).view(shape), std=torch.tensor(std).view(shape))

    @classmethod
    def of_config(cls, source: str) -> LatentStatistics:
        """Read them off the VAE's configuration (Wan, Qwen-Image).

        Args:
            source: Diffusers folder or hub id.

        Raises:
            WeightsError: there is no VAE, or its configuration has none.
        """
        folder = fetch(source, ("vae",)) / "vae"
        config = read_config(folder / "config.json")
        if missing := [name for name in _NAMES if name not in config]:
            raise WeightsError(_missing(f"{folder}/config.json", missing))
        # Lists of numbers, as ``read_config`` has checked.
        return cls.of_channels(*(cast(Sequence[float], config[name]) for name in _NAMES))

    @classmethod
    def of_buffers(
        cls, source: str, vae: str = "vae", shape: Sequence[int] = (1, -1, 1, 1, 1)
    ) -> LatentStatistics:
        """Read them off the VAE's weights (LTX-Video), where they are buffers.

        Normalised latents are ``(z - mean) scaling_factor / std`` there, so std is that of the file
        by ``scaling_factor``, which is 1 in all published models.

        Args:
            source: Diffusers folder or hub id.
            vae: folder of the VAE in it.
            shape: of both, where there are not just one for each channel (LTX-2's sound).

        Raises:
            WeightsError: the weights are missing or damaged, or have no such buffers.
        """
        folder = fetch(source, (vae,)) / vae
        weights = module_weights(folder)
        if missing := [name for name in _NAMES if name not in weights.describe()]:
            raise WeightsError(_missing(f"the weights in {folder}", missing))
        tensors = weights.read(_NAMES)
        mean, std = (tensors[name].float().view(*shape) for name in _NAMES)
        factor = read_number(read_config(folder / "config.json"), "scaling_factor", 1.0)
        return cls(mean=mean, std=std / factor)

    def normalize_by_inverse(self, raw: Tensor) -> Tensor:
        """Compute ``(raw - mean) (1 / std)`` [B, C, T, H, W], which rounds as Wan's code does and
        otherwise than ``normalize_latents``."""
        mean, std = self.mean.to(raw), self.std.to(raw)
        return (raw - mean) * (1.0 / std)

    def denormalize_by_inverse(self, latents: Tensor) -> Tensor:
        """Compute ``z / (1 / std) + mean`` [B, C, T, H, W] in fp32 or wider, which rounds as Wan's
        code does."""
        wide = flow.widen(latents)
        return wide / (1.0 / self.std.to(wide)) + self.mean.to(wide)

    def to(self, device: torch.device) -> LatentStatistics:
        """Copy them to ``device``."""
        return LatentStatistics(mean=self.mean.to(device), std=self.std.to(device))


def _missing(where: str, names: Sequence[str]) -> str:
    return (
        f"{where} has no {' and '.join(names)}; without that latents cannot be normalised. Use the "
        "VAE of a model of this family"
    )
