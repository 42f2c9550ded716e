"""Options of flow maps on their own clips. No torch here: run files are checked without it."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import evolve, field, frozen
from distill_protocols import ONE_TENSOR, PlannedRun, Problem, RoleNeed, SamplerSpec
from distill_protocols.validators import at_least

from distill_methods.distribution_matching.config import MatchingConfig, is_unguided
from distill_methods.flow_map.config import FlowMap, flow_map_problems, is_deterministic
from distill_methods.latent_config import can_be_left_early
from distill_methods.roles import STUDENT


def _are_steps(config: FlowMapDMDConfig, _attribute: object, value: tuple[int, ...]) -> None:
    if not value or min(value) < 1:
        raise ValueError(
            f"{list(value)} must name at least one number of steps, each at least 1; AnyFlow has "
            "[2, 4, 8, 16, 50]"
        )
    if config.exit != "uniform" or config.critic_exits or len(config.by_exit) > 1:
        raise ValueError(
            "exit, critic_exits and a guidance for each exit are of the steps of one sampler, and "
            "a flow map is trained at those of many (rollout_steps). Leave them out"
        )


@frozen(kw_only=True)
class FlowMapDMDConfig(MatchingConfig):
    """Distribution matching of a flow map's clips, beside its own loss (AnyFlow, second stage).

    Attributes:
        flow_map: the loss of ``flow_map``.
        flow_map_weight: its weight in the sum; 0: matching alone. AnyFlow 1.
        rollout_steps: numbers of steps, one of which is drawn for each clip of the student: one of
            its steps is made as it is, those before it and those after it as one call each.
        student_sampler: how the student is sampled in validation and export; the rollout has its
            shift. Its guidance must be 1.
    """

    flow_map: FlowMap = field(factory=FlowMap)
    flow_map_weight: float = field(
        default=1.0, validator=at_least(0, "the student would be led away from its own average")
    )
    student_sampler: SamplerSpec = field(
        default=SamplerSpec(steps=4, shift=5.0),
        validator=[is_unguided, can_be_left_early, is_deterministic],
    )
    rollout_steps: tuple[int, ...] = field(default=(2, 4, 8, 16, 50), validator=_are_steps)

    @property
    def roles(self) -> tuple[RoleNeed, ...]:
        """Those of distribution matching; the student has a second time embedder."""
        return tuple(
            self.flow_map.student if need.name == STUDENT.name else need for need in super().roles
        )

    @property
    def needs_negative(self) -> bool:
        """Whether a teacher, or the student, is called with a negative condition."""
        of_map = self.flow_map_weight > 0 and self.flow_map.is_guided
        return super().needs_negative or of_map

    @property
    def guided_map(self) -> FlowMapDMDConfig:
        """This config with the guidance of the flow map for its teachers."""
        return evolve(self, real_score_guidance_scale=self.flow_map.guidance_scale)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Capabilities that the adapter must have."""
        return tuple(dict.fromkeys((*super().capabilities, ONE_TENSOR, "supports_flow_maps")))

    def problems(self, run: PlannedRun) -> Iterator[Problem]:
        """See ``MethodConfig.problems``."""
        yield from super().problems(run)
        yield from flow_map_problems(run)

    def metrics(self, iteration: int) -> tuple[str, ...]:
        """See ``MethodConfig.metrics``."""
        names = super().metrics(iteration)
        if STUDENT.name not in self.turns(iteration) or self.flow_map_weight == 0:
            return names
        return (*names, "loss/flow_map_loss", *self.flow_map.metrics)
