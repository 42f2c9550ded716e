"""What the methods of this package ask of an adapter: no text encoder, no caches."""

from __future__ import annotations

from typing import Protocol

from distill_protocols import Capabilities
from distill_protocols.adapter import (
    CausalRollout,
    Denoiser,
    ExpertRouting,
    ImageConditioning,
    LatentCodec,
    NoiseSchedule,
    Sampler,
)


class LatentDiffusion(
    NoiseSchedule,
    Denoiser,
    LatentCodec,
    Sampler,
    CausalRollout,
    ExpertRouting,
    ImageConditioning,
    Protocol,
):
    """A flow-matching model over latents that can be called, and sampled for a look at it.

    Experts, pictures and caches are asked for only where its capabilities have them.
    """

    @property
    def capabilities(self) -> Capabilities: ...
