"""What the methods of this package ask of an adapter: no text encoder.

What a family may not have (causal roles, experts, pictures, discriminators, tangents) is an
attribute of ``OptionalContracts`` that is None then.
"""

from __future__ import annotations

from typing import Protocol

from distill_protocols import (
    CapabilityError,
    CausalRollout,
    Chunk,
    Denoiser,
    Discriminating,
    LatentCodec,
    NoiseSchedule,
    OptionalContracts,
    Sampler,
    Tangents,
)


class LatentDiffusion(
    NoiseSchedule,
    Denoiser,
    LatentCodec,
    Sampler,
    OptionalContracts,
    Protocol,
):
    """A flow-matching model over latents that can be called, sampled and decoded."""


def chunks_of(adapter: LatentDiffusion, role: str, frames: int | None = None) -> tuple[Chunk, ...]:
    """How ``role`` divides a video of ``frames`` latent frames; None: of a clip of the run.

    One chunk that is the whole video for a family without causal roles, and for a role that is not
    causal.
    """
    if adapter.causal is not None:
        return adapter.causal.chunks(role, frames)
    return (Chunk(0, adapter.latent_shape[1] if frames is None else frames),)


def causal_of(adapter: LatentDiffusion, by: str) -> CausalRollout:
    """The adapter's causal contract.

    Raises:
        CapabilityError: it has none.
    """
    if adapter.causal is None:
        raise CapabilityError(_lacks(by, "causal roles with key/value caches"))
    return adapter.causal


def discriminators_of(adapter: LatentDiffusion, by: str) -> Discriminating:
    """The adapter's contract for discriminators.

    Raises:
        CapabilityError: it has none.
    """
    if adapter.discriminators is None:
        raise CapabilityError(_lacks(by, "discriminators on features of a model"))
    return adapter.discriminators


def tangents_of(adapter: LatentDiffusion, by: str) -> Tangents:
    """The adapter's contract for forward-mode derivatives.

    Raises:
        CapabilityError: it has none.
    """
    if adapter.tangents is None:
        raise CapabilityError(_lacks(by, "forward-mode derivatives of a call"))
    return adapter.tangents


def _lacks(by: str, what: str) -> str:
    return (
        f"{by} needs {what}, which this adapter does not have. Choose another method, another "
        "option of it, or a family that supports this"
    )
