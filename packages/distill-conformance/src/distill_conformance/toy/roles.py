"""Roles, optimizers, batches and conditions for tests of methods."""

from __future__ import annotations

from collections.abc import (
    Iterable,
    Sequence,
)

import torch
from attrs import frozen
from distill_protocols import (
    Batch,
    Condition,
    ConditioningError,
    DiscriminatorSpec,
    LatentParts,
    Latents,
    ModelBundle,
    RoleHandle,
    RoleNeed,
    RoleSpec,
    RowGenerators,
)
from torch import Tensor

from distill_conformance.toy.adapter import ToyAdapter
from distill_conformance.toy.family import ToyFamily
from distill_conformance.toy.networks import (
    CLIP,
    LATENT_SHAPE,
    SOUND,
    SOUND_SHAPE,
    TEXT_DIM,
    ToyConfig,
)


@frozen
class ToyConditioning:
    """A provider whose negative condition is not zero, or one that has none."""

    has_negative: bool = True

    def negative(self) -> Condition:
        if not self.has_negative:
            raise ConditioningError("this run has no negative condition")
        return Condition({"text": torch.full((1, TEXT_DIM), -0.5)})

    def encode(
        self,
        prompts: Sequence[str],
        images: Tensor | None = None,
        last_images: Tensor | None = None,
    ) -> Condition:
        return Condition({"text": torch.zeros(len(prompts), TEXT_DIM)})


def toy_models(
    needs: Sequence[RoleNeed],
    *,
    seed: int = 0,
    causal_roles: Iterable[str] = (),
    sound: bool = False,
) -> tuple[ToyAdapter, ModelBundle]:
    """Roles as a method needs them, each with weights of its own, and optimizers of those that
    are trained.

    Args:
        needs: ``MethodConfig.roles``; a discriminator reads the first of its ``features_of``.
    """
    config = ToyConfig(causal_roles=causal_roles, sound=sound)
    specs = [
        RoleSpec(
            name=need.name,
            path=need.name,
            trainable=need.trainable,
            heads=DiscriminatorSpec(on=need.features_of[0], blocks=(0,))
            if need.features_of
            else None,
            exits=need.exits,
        )
        for need in needs
    ]
    family = ToyFamily()
    bundle = family.load(specs, config, device=torch.device("cpu"), seed=seed)
    for role in bundle.roles.values():
        add_optimizers(role)
    return family.adapter(bundle, config, source="toy"), bundle


def add_optimizers(role: RoleHandle, *, lr: float = 1e-3, decay: float = 0.98) -> None:
    """Give each trained module an AdamW, whose learning rate is multiplied by ``decay`` at every
    step."""
    for key in role.modules if role.trainable else ():
        optimizer = torch.optim.AdamW(role.trained_parameters(key).values(), lr=lr)
        role.optimizers[key] = optimizer
        role.schedulers[key] = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)


def toy_batch(size: int, seed: int = 0, *, levels: int = 0, sound: bool = False) -> Batch:
    """Random latents and texts; row n is the same in a batch of any size.

    Args:
        levels: states of a teacher's trajectory that each sample holds.
        sound: whether the clips have both parts.
    """
    rows = RowGenerators.seeded(seed, "toy.batch", range(size))
    latents: Latents = rows.normal(LATENT_SHAPE)
    if sound:
        latents = LatentParts({CLIP: latents, SOUND: rows.normal(SOUND_SHAPE)})
    return Batch(
        latents=latents,
        cond=Condition({"text": rows.normal((TEXT_DIM,))}),
        ids=tuple(f"sample-{i}" for i in range(size)),
        trajectory=rows.normal((levels, *LATENT_SHAPE)) if levels else None,
    )
