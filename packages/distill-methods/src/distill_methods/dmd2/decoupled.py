"""Teachers whose guidance is taken at a noise level of its own (Decoupled DMD)."""

from __future__ import annotations

import torch
from distill_protocols import Condition, ContractError, Latents, map_latents
from torch import Tensor

from distill_methods.context import MethodContext
from distill_methods.distribution_matching.by_exit import TeachersByExit
from distill_methods.dmd2.config import DMD2Config
from distill_methods.rollouts import Rollout, shared_exit


class DecoupledTeachers:
    """DMD's teacher in two parts, each at a t of its own (Decoupled DMD, arXiv:2511.22677).

    With guidance ``r = c + (w - 1) (c - u)`` the direction f - r is that of two forces: f - c draws
    the clips to the distribution of the unguided teacher (DM), and ``-(w - 1) (c - u)`` draws them
    on to what guidance prefers (CFG augmentation, CA). Here c is taken at the t of the scores, and
    the second part at another t, below that of the step which made the clip, from other noise::

        r = c(x_t, t) + [r - c](x_t', t'),   t' < t_k

    At t' = t it would be DMD's own; normaliser and loss are those of DMD with this r. The teachers
    are called once more than for DMD, as families combine guidance in ways of their own.

    Raises:
        ContractError: no t of the scores lies below some exit step.
    """

    def __init__(self, context: MethodContext, config: DMD2Config) -> None:
        self._context = context.named(f"{context.name}.augmentation")
        try:
            self._times = config.augmentation_times()
        except ValueError as error:
            raise ContractError(f"decoupled: {error}") from None
        self._guided = TeachersByExit(self._context, config)
        self._unguided = TeachersByExit(self._context, config.unguided)

    @property
    def names(self) -> tuple[str, ...]:
        """Roles of the teachers."""
        return self._guided.names

    @torch.no_grad()
    def predict(
        self, x_t: Latents, t: Tensor, cond: Condition, rollout: Rollout, iteration: int
    ) -> Latents:
        """See ``ScoreTeachers.predict``."""
        context = self._context
        time = self._times[shared_exit(rollout)]
        noised = context.noise.add_noise_at_random_time(
            rollout.x0, context.name, iteration, time, *self.names
        )
        guided, unguided = (
            teachers.predict(noised.x_t, noised.t, cond, rollout, iteration)
            for teachers in (self._guided, self._unguided)
        )
        matched = self._unguided.predict(x_t, t, cond, rollout, iteration)
        return map_latents(lambda r, w, c: r + (w - c), matched, guided, unguided)
