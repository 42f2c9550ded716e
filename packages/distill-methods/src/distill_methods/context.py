"""The context that the parts of a method share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import evolve, frozen
from distill_protocols import Condition, EndTurn, ModelBundle, keep_graph

from distill_methods.contracts import LatentDiffusion
from distill_methods.noise_sampler import NoiseSampler


@frozen(eq=False, kw_only=True)
class MethodContext:
    """Everything that rollouts, teachers, discriminator and losses of one method are built on.

    Attributes:
        name: of the method; the purposes of random streams begin with it.
        negative: where something is called with guidance; of several rows each sample draws one.
        device: where the student computes.
        end_turn: see ``EndingTurns``.
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
    end_turn: EndTurn = keep_graph

    def draw_negative(self, rows: int) -> Condition | None:
        """Return the negative condition of ``rows`` samples: the one that there is, as one row, or
        one of several for each, drawn from the stream ``<name>.negative``."""
        if self.negative is None or len(self.negative) == 1:
            return self.negative
        generators = self.noise.streams.rows(f"{self.name}.negative", rows)
        chosen = generators.integers(len(self.negative))
        return self.negative[chosen.to(self.device)]

    def drop_condition(self, cond: Condition, rate: float, purpose: str) -> Condition:
        """Replace the condition of some samples by the negative one, each with the chance ``rate``,
        drawn from the stream ``purpose``."""
        negative = self.draw_negative(len(cond))
        assert negative is not None  # ``Critic`` checks it.
        negative = negative.expand(len(cond)).merged_onto(cond)
        dropped = (self.noise.streams.rows(purpose, len(cond)).uniform() < rate).to(self.device)
        return Condition(
            {
                name: torch.where(dropped.view(-1, *[1] * (value.dim() - 1)), other, value)
                for name, value in cond.tensors.items()
                for other in [negative.tensors[name]]
            }
        )

    def named(self, name: str) -> MethodContext:
        """Return the same under another name, for a second part that draws numbers of its own."""
        return evolve(self, name=name)
