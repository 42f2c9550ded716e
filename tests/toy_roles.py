"""Roles of the toy family by name and seed, and what tests of methods ask of them."""

from __future__ import annotations

import torch
from distill_conformance.toy import ToyConfig, ToyFamily, add_optimizers
from distill_protocols import Batch, DiscriminatorSpec, ModelBundle, RoleSpec
from torch import Tensor

CAUSAL = ToyFamily().capabilities(ToyConfig(causal_roles={"student"}))
"""The student makes frame after frame."""
BOTH_CAUSAL = ToyFamily().capabilities(ToyConfig(causal_roles={"student", "teacher"}))
"""The teacher too."""


def toy_bundle(*, lr: float = 1e-2, heads_on: str = "teacher", **seeds: int) -> ModelBundle:
    """Make roles by name, each with the weights of its seed; all but ``teacher`` are trained.

    ``discriminator`` is heads on ``heads_on``.
    """
    heads = DiscriminatorSpec(on=heads_on, blocks=(0,))
    specs = [
        RoleSpec(
            name=name,
            path=str(seed),
            trainable=name != "teacher",
            heads=heads if name == "discriminator" else None,
        )
        for name, seed in seeds.items()
    ]
    bundle = ToyFamily().load(specs, ToyConfig(), device=torch.device("cpu"))
    for role in bundle.roles.values():
        add_optimizers(role, lr=lr, decay=1.0)
    return bundle


def rows(batch: Batch, start: int, stop: int) -> Batch:
    """Return some samples of a batch."""
    part = slice(start, stop)
    states = None if batch.trajectory is None else batch.trajectory[part]
    return Batch(
        latents=batch.latents[part], cond=batch.cond[part], ids=batch.ids[part], trajectory=states
    )


def gradients(bundle: ModelBundle) -> dict[str, list[Tensor]]:
    """Copy the gradients of each role; a role that none reached has an empty list."""
    return {
        name: [p.grad.clone() for m in role.modules.values() for p in m.parameters()
               if p.grad is not None]
        for name, role in bundle.roles.items()
    }  # fmt: skip
