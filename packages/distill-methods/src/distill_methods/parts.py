"""Latents of several parts in losses and logs; of one tensor all is as without parts."""

from __future__ import annotations

from collections.abc import Callable

from distill_protocols import LatentParts, Latents, LatentsT, map_latents
from torch import Tensor

from distill_methods.contracts import LatentDiffusion, require_contract


def map_masked(
    function: Callable[..., Tensor],
    first: LatentsT,
    *others: Latents,
    loss_mask: Tensor | None,
) -> LatentsT:
    """Apply ``function`` to the tensors of each part, and to the loss mask after them, which is of
    the main part: the others are predicted as a whole."""
    main = first.main if isinstance(first, LatentParts) else first
    return map_latents(
        lambda tensor, *rest: function(tensor, *rest, loss_mask if tensor is main else None),
        first,
        *others,
    )


def sum_part_losses(
    adapter: LatentDiffusion,
    name: str,
    loss: Callable[..., Tensor],
    *latents: Latents,
    loss_mask: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add up the loss of each part, with the family's weights (``JointLatents.part_weights``).

    A mean over all numbers would weight a part by its size instead: of a clip of LTX-2 sound has
    about one number in a hundred.

    Args:
        name: the metrics of the parts are ``<name>/<part>``.
        loss: of the tensors of one part, and its loss mask.
        loss_mask: see ``map_masked``.

    Returns:
        The sum, and each part's loss without its weight; no metrics where there are no parts.
    """
    first = latents[0]
    if not isinstance(first, LatentParts):
        return loss(*latents, loss_mask), {}
    # As rows of one number, because parts hold tensors with the clips first.
    losses = map_masked(
        lambda *tensors: loss(*tensors)[None], first, *latents[1:], loss_mask=loss_mask
    ).tensors
    weights = require_contract(adapter.parts, "supports_latent_parts", by=name).part_weights
    terms = [weights[part] * value.squeeze() for part, value in losses.items()]
    metrics = {f"{name}/{part}": value.detach().squeeze() for part, value in losses.items()}
    return sum(terms[1:], terms[0]), metrics


def measure_parts(
    name: str, function: Callable[[Tensor], Tensor], latents: Latents
) -> dict[str, Tensor]:
    """Return what ``function`` gives of each part, for logs: ``name`` of one tensor or of the main
    part, ``<name>/<part>`` of the others."""
    if not isinstance(latents, LatentParts):
        return {name: function(latents)}
    return {
        name if tensor is latents.main else f"{name}/{part}": function(tensor)
        for part, tensor in latents.tensors.items()
    }


def name_parts(name: str, latents: Latents) -> dict[str, Tensor]:
    """Return latents as outputs, with the names of ``measure_parts``."""
    return measure_parts(name, lambda tensor: tensor, latents)
