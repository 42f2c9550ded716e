"""Options of rCM. No torch here: run files are checked without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from attrs import field, frozen
from attrs.validators import in_
from distill_protocols import PlannedRun, Problem
from distill_protocols.validators import at_least

from distill_methods.consistency.config import Continuous, Discrete, form_problems, one_of_the_two
from distill_methods.distribution_matching.config import MatchingConfig
from distill_methods.roles import STUDENT


@frozen(kw_only=True)
class RCMConfig(MatchingConfig):
    """rCM (Zheng et al. 2025): a consistency loss, and distribution matching beside it.

    Attributes:
        rollout: where the clips that are matched come from; see DMD2.
        consistency_weight: of the consistency loss beside the other. rCM's 100 is
            ``100 / sqrt(D)`` here with ``continuous``, D = C T H W of a clip, as its tangent has
            norm 1 and ours root mean square 1: 0.07 for [16, 20, 60, 104]; with ``discrete``
            (``loss: l2``) it is 50.
        continuous: how the consistency loss is made where neither of the two is written.
        discrete: on a grid, without differentiating the student forward.
    """

    rollout: Literal["simulate", "data"] = field(
        default="simulate", validator=in_(("simulate", "data"))
    )
    consistency_weight: float = field(
        default=0.07, validator=at_least(0, "the student would be led away from consistency")
    )
    discrete: Discrete | None = None
    continuous: Continuous | None = field(default=None, validator=one_of_the_two)

    @property
    def form(self) -> Discrete | Continuous:
        """The one of the two that is used."""
        return self.discrete or self.continuous or Continuous()

    def student_updates(self, iteration: int) -> int:
        """How many updates the student has had at the end of ``iteration``."""
        return iteration // self.generator_update_interval

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What the adapter must be able to do."""
        jvp = ("supports_jvp",) if isinstance(self.form, Continuous) else ()
        return (*super().capabilities, *jvp)

    def problems(self, run: PlannedRun) -> Iterator[Problem]:
        """See ``MethodConfig.problems``."""
        yield from super().problems(run)
        yield from form_problems(self.form, run)

    def update_share(self, role: str, low: float, high: float) -> float:
        """See ``MethodConfig.update_share``."""
        own = super().update_share(role, low, high)
        if role != STUDENT.name:
            return own
        # It learns from either loss, each at a t of its own.
        return 1 - (1 - own) * (1 - self.form.share_within(low, high))
