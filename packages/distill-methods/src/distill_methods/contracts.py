"""The part of the adapter contract that the methods of this package use: no text encoder.

What a family may not have (causal roles, experts, image conditions, discriminators, tangents) is
an attribute of ``OptionalContracts`` that is None then. The functions below are the only places
that read these attributes: each either gives the answer that is true of a family without the
contract, or refuses at construction.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from distill_protocols import (
    Batch,
    CapabilityError,
    Chunk,
    Denoiser,
    LatentCodec,
    NoiseSchedule,
    OptionalContracts,
    Sampler,
)
from torch import Tensor

from distill_methods.time_sampling import MAX_T, TimeRange

ContractT = TypeVar("ContractT")


class LatentDiffusion(
    NoiseSchedule,
    Denoiser,
    LatentCodec,
    Sampler,
    OptionalContracts,
    Protocol,
):
    """A flow-matching model over latents that can be called, sampled and decoded."""


def require_contract(contract: ContractT | None, capability: str, *, by: str) -> ContractT:
    """Return an optional contract of the adapter that a method cannot do without::

        self._tangents = require_contract(adapter.tangents, "supports_jvp", by=name)

    ``LatentMethod`` checks the capabilities of the config first, so that this refuses only parts
    that are built without it, and adapters that state a capability without its contract.

    Args:
        by: name of what needs it.

    Raises:
        CapabilityError: the adapter does not have it.
    """
    if contract is None:
        raise CapabilityError(
            f"{by} needs {capability}, which this adapter does not have. Choose another method, "
            "another option of it, or a family that supports this"
        )
    return contract


def chunks_of(adapter: LatentDiffusion, role: str, frames: int | None = None) -> tuple[Chunk, ...]:
    """Return how ``role`` divides a video of ``frames`` latent frames; None: a clip of the run.

    For a family without causal roles, and for a role that is not causal, that is one chunk: the
    whole video.
    """
    if adapter.causal is not None:
        return adapter.causal.chunks(role, frames)
    return (Chunk(0, adapter.latent_shape[1] if frames is None else frames),)


def expert_ranges_of(adapter: LatentDiffusion, *roles: str) -> tuple[TimeRange, ...]:
    """Return the rising ranges of t at which all of ``roles`` can be called and within which none
    changes its expert (``ExpertRouting.expert_ranges``); one range for a family without experts."""
    if adapter.experts is None:
        return ((0.0, MAX_T),)
    return adapter.experts.expert_ranges(*roles)


def loss_mask_of(adapter: LatentDiffusion, batch: Batch) -> Tensor | None:
    """Return 1 on frames that the model predicts and 0 on those that the condition gives (a first
    frame), [1, 1, T, 1, 1]; None: the model predicts all of them.

    Predictions of v mean nothing on a frame that is given, so it must stay out of every loss.
    """
    if adapter.images is None:
        return None
    frames = batch.latent_shape[1]
    if frames == adapter.latent_shape[1]:
        return adapter.images.trained_frames(batch.cond)
    return adapter.images.trained_frames(batch.cond, frames)
