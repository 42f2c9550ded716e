"""The context that the parts of a method share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import evolve, frozen
from distill_protocols import Condition, ModelBundle

from distill_methods.contracts import LatentDiffusion
from distill_methods.noise_sampler import NoiseSampler


@frozen(eq=False, kw_only=True)
class MethodContext:
    """Everything that rollouts, teachers, discriminator and losses of one method are built on.

    Attributes:
        name: of the method; the purposes of random streams begin with it.
        negative: one row, where something is called with guidance.
        device: where the student computes.
        poll: called before each model call of a rollout; raises where the run shall stop
            (``StopFlag.poll``).
    """

    name: str
    bundle: ModelBundle
    adapter: LatentDiffusion
    noise: NoiseSampler
    negative: Condition | None
    device: torch.device
    poll: Callable[[], None]

    def named(self, name: str) -> MethodContext:
        """Return the same under another name, for a second part that draws numbers of its own."""
        return evolve(self, name=name)
