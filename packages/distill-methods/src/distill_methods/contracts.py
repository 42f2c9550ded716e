"""What the methods of this package ask of an adapter: no text encoder, no caches."""

from __future__ import annotations

from typing import Protocol

from distill_protocols import Capabilities
from distill_protocols.adapter import (
    CausalRollout,
    Denoiser,
    Discriminating,
    ExpertRouting,
    ImageConditioning,
    LatentCodec,
    NoiseSchedule,
    Sampler,
    Tangents,
)


class LatentDiffusion(
    NoiseSchedule,
    Denoiser,
    Discriminating,
    LatentCodec,
    Sampler,
    CausalRollout,
    ExpertRouting,
    ImageConditioning,
    Protocol,
):
    """A flow-matching model over latents that can be called, and sampled for a look at it.

    Experts, pictures, caches and features are asked for only where its capabilities have them.
    """

    @property
    def capabilities(self) -> Capabilities: ...


class DifferentiableDiffusion(LatentDiffusion, Tangents, Protocol):
    """One whose calls can also be differentiated along a direction (``supports_jvp``)."""
