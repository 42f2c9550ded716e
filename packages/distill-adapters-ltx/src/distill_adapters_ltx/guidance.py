"""Guidance rescaling, which LTX's pipelines apply to a guided prediction."""

from __future__ import annotations

from torch import Tensor


def rescale_guidance(guided: Tensor, conditional: Tensor, factor: float) -> Tensor:
    """Pull the spread of ``guided`` back to that of ``conditional``, a sample at a time.

    ``factor guided std(conditional) / std(guided) + (1 - factor) guided`` (Lin et al. 2024, "Common
    Diffusion Noise Schedules and Sample Steps are Flawed", eqs. 15 and 16), in the order of
    ``LTXPipeline``.

    Args:
        guided: u + w (c - u) [B, ...].
        conditional: c [B, ...].
        factor: phi, from 0 (nothing changes) to 1.
    """
    rest = list(range(1, guided.dim()))
    spread = conditional.std(dim=rest, keepdim=True) / guided.std(dim=rest, keepdim=True)
    return factor * (guided * spread) + (1 - factor) * guided
