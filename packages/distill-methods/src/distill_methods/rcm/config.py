"""Options of rCM. No torch here: run files are checked without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from attrs import field, frozen
from attrs.validators import in_
from distill_protocols import PlannedRun, Problem
from distill_protocols.validators import at_least

from distill_methods.consistency.config import (
    Continuous,
    Discrete,
    form_problems,
    is_the_only_form,
)
from distill_methods.distribution_matching.config import MatchingConfig
from distill_methods.latent_config import RolloutSource
from distill_methods.roles import STUDENT


@frozen(kw_only=True)
class RCMConfig(MatchingConfig):
    """rCM (Zheng et al. 2025): a consistency loss, and distribution matching beside it.

    Attributes:
        rollout: where the input of the clips that are matched comes from; see ``DMD2Config``.
        consistency_weight: weight of the consistency loss in the sum. rCM's 100 is
            ``100 / sqrt(D)`` here with ``continuous``, D = C T H W of a clip, as its tangent has
            norm 1 and ours root mean square 1: 0.07 for [16, 20, 60, 104]; with ``discrete``
            (``loss: l2``) it is 50.
        consistency_warmup: iterations at the beginning in which the student alone steps, in each of
            them, by consistency alone; the schedule of the others begins after them. rCM's is its
            ``tangent_warmup``.
        continuous: the consistency loss without a grid; the default where neither is stated.
        discrete: the consistency loss on a grid, which needs no forward-mode derivative.
    """

    rollout: RolloutSource = field(default="simulate", validator=in_(get_args(RolloutSource)))
    consistency_weight: float = field(
        default=0.07, validator=at_least(0, "the student would be led away from consistency")
    )
    consistency_warmup: int = field(
        default=0, validator=at_least(0, "it counts iterations; 0 is none")
    )
    discrete: Discrete | None = None
    continuous: Continuous | None = field(default=None, validator=is_the_only_form)

    @property
    def form(self) -> Discrete | Continuous:
        """The form that is used."""
        return self.discrete or self.continuous or Continuous()

    def rollout_times(self, low: float, high: float) -> tuple[float, ...]:
        """See ``LatentMethodConfig.rollout_times``."""
        return self.levels_until(low, high) if self.rollout == "simulate" else ()

    def turns(self, iteration: int) -> tuple[str, ...]:
        """See ``MatchingConfig.turns``; in the warmup the student alone."""
        if iteration <= self.consistency_warmup:
            return (STUDENT.name,)
        return super().turns(iteration - self.consistency_warmup)

    def student_updates(self, iteration: int) -> int:
        """Return how many updates the student has had at the end of ``iteration``."""
        later = max(0, iteration - self.consistency_warmup)
        return min(iteration, self.consistency_warmup) + later // self.generator_update_interval

    def metrics(self, iteration: int) -> tuple[str, ...]:
        """See ``MethodConfig.metrics``."""
        if iteration <= self.consistency_warmup:
            return ("loss/total_loss", "loss/consistency_loss", *self.form.metrics)
        names = super().metrics(iteration)
        if STUDENT.name not in self.turns(iteration):
            return names
        return (*names, "loss/consistency_loss", *self.form.metrics)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Capabilities that the adapter must have."""
        return (*super().capabilities, *self.form.capabilities)

    def problems(self, run: PlannedRun) -> Iterator[Problem]:
        """See ``MethodConfig.problems``."""
        yield from super().problems(run)
        yield from form_problems(self.form, run)

    def update_share(self, role: str, low: float, high: float) -> float:
        """See ``MethodConfig.update_share``."""
        of_matching = super().update_share(role, low, high)
        if role != STUDENT.name:
            return of_matching
        # Two losses train it, each at a t of its own: the probability that one of them is inside.
        return 1 - (1 - of_matching) * (1 - self.form.probability_within(low, high))
