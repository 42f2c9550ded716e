"""Options of flow maps. No torch here: run files are checked without it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, get_args

from attrs import evolve, field, frozen
from attrs.validators import in_
from distill_protocols import (
    ONE_TENSOR,
    HealthKind,
    PlannedRun,
    Problem,
    RoleNeed,
    SamplerSpec,
    TargetTimeSpec,
)
from distill_protocols.validators import above, at_least, within

from distill_methods.distribution_matching.config import is_unguided
from distill_methods.latent_config import can_be_left_early
from distill_methods.roles import STUDENT
from distill_methods.teachers.config import (
    NEGATIVE_GUIDANCE,
    DefaultGuidance,
    TeachersConfig,
)
from distill_methods.time_sampling import MAX_T, TimeSampling

VelocitySource = Literal["teacher", "data"]
"""What the average is taken of: the guided teachers' velocity, or that of the data, ``eps - x0``,
guided by the student itself."""


def is_deterministic(_config: object, _attribute: object, value: SamplerSpec) -> None:
    """Validate ``student_sampler`` of a flow map."""
    if value.stochastic:
        raise ValueError(
            "stochastic: true predicts the clean clip at each step and noises it again, and a flow "
            "map predicts where the trajectory is at the next step. Leave stochastic out"
        )


def _leaves_some(config: FlowMap, _attribute: object, value: float) -> None:
    if config.same_time_share + value > 1:
        raise ValueError(
            f"{value} and same_time_share ({config.same_time_share}) are more than all draws "
            "together; AnyFlow has 0.5 and 0.25"
        )


@frozen(kw_only=True)
class FlowMap:
    """The loss of average velocities (MeanFlow, Geng et al. 2025; AnyFlow, arXiv:2605.13724).

    Attributes:
        velocity: teacher: the average is that of the guided teacher (FastGen's MeanFlow of Wan).
            data: of ``eps - x0``, without a teacher (MeanFlow, AnyFlow).
        guidance_scale: w of the velocity, fused into the student, which is then called once.
            AnyFlow 3.
        time: two draws of t for each sample; the larger is t, the smaller r.
        same_time_share: share of the draws with r = t, where u is the velocity itself.
        to_data_share: share of those with r = 0, where one call makes a clip.
        difference: h of the derivative ``(u(t + h) - u(t - h)) / 2h``, in units of t. AnyFlow and
            FastGen 5.
        gate: g of ``(1 - g) e(t) + g e(r)``, the student's two time embeddings.
        adaptive_power: p of the weight ``1 / (d + c)^p`` of a sample whose error is d (MeanFlow,
            eq. 22); 0: all count alike.
        adaptive_c: c of it.
    """

    velocity: VelocitySource = field(default="teacher", validator=in_(get_args(VelocitySource)))
    guidance_scale: float = field(default=3.0, validator=at_least(0, NEGATIVE_GUIDANCE))
    time: TimeSampling = field(default=TimeSampling(shift=5.0))
    same_time_share: float = field(default=0.5, validator=within(0, 1, "it is a share of draws"))
    to_data_share: float = field(
        default=0.25, validator=[within(0, 1, "it is a share of draws"), _leaves_some]
    )
    difference: float = field(
        default=5.0,
        validator=within(0.01, 50, "a shorter one is lost in rounding, a longer no derivative"),
    )
    gate: float = field(
        default=0.25, validator=within(0, 1, "it is the share of the second time embedding")
    )
    adaptive_power: float = field(
        default=1.0, validator=within(0, 1, "MeanFlow has 1, which makes all samples alike")
    )
    adaptive_c: float = field(
        default=1e-3, validator=above(0, "a sample without error would be divided by 0")
    )

    @property
    def student(self) -> RoleNeed:
        """The student, with a second time embedder."""
        return evolve(STUDENT, target_time=TargetTimeSpec(gate=self.gate))

    @property
    def is_guided(self) -> bool:
        """Whether the velocity needs a negative condition."""
        return self.guidance_scale != 1

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that the loss gives beside itself."""
        return ("flow_map_error", "derivative_rms")


@frozen(kw_only=True)
class FlowMapConfig(TeachersConfig):
    """A flow map: one student for any number of steps (AnyFlow, first stage).

    Attributes:
        flow_map: the loss.
        teachers: several teachers by role, in the place of the one role ``teacher``: the velocity
            is the weighted sum of their guided predictions.
        student_sampler: how the student is sampled in validation and export, in any number of
            steps: views and reports may name others. Its guidance must be 1.
    """

    flow_map: FlowMap = field(factory=FlowMap)
    student_sampler: SamplerSpec = field(
        default=SamplerSpec(steps=4, shift=5.0),
        validator=[is_unguided, can_be_left_early, is_deterministic],
    )

    @property
    def roles(self) -> tuple[RoleNeed, ...]:
        """The student, and the teachers whose velocity is averaged."""
        teachers = self.teacher_roles if self.flow_map.velocity == "teacher" else ()
        return (self.flow_map.student, *teachers)

    @property
    def default_guidance(self) -> DefaultGuidance:
        """See ``TeachersConfig.default_guidance``."""
        return DefaultGuidance(self.flow_map.guidance_scale, None, "flow_map.guidance_scale")

    @property
    def teacher_guidance(self) -> Mapping[str, tuple[float, float | None]]:
        """See ``MethodConfig.teacher_guidance``; none of a run without teachers."""
        return super().teacher_guidance if self.flow_map.velocity == "teacher" else {}

    @property
    def needs_negative(self) -> bool:
        """Whether teachers, or the student, are called with a negative condition."""
        if self.flow_map.velocity == "teacher":
            return self.has_guided_teacher
        return self.flow_map.is_guided

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Capabilities that the adapter must have."""
        guided = ("supports_cfg",) if self.needs_negative else ()
        return ("pred:v", ONE_TENSOR, "supports_flow_maps", *guided)

    def problems(self, run: PlannedRun) -> Iterator[Problem]:
        """See ``MethodConfig.problems``."""
        yield from super().problems(run)
        yield from flow_map_problems(run)
        if self.flow_map.velocity == "data" and self.teachers:
            yield Problem(
                "teachers",
                "they have no effect: flow_map.velocity: data learns from data alone. Leave them "
                "out, or set velocity: teacher",
            )

    def metrics(self, iteration: int) -> tuple[str, ...]:
        """See ``MethodConfig.metrics``."""
        return (*super().metrics(iteration), *self.flow_map.metrics)

    @property
    def health_metrics(self) -> Mapping[HealthKind, str]:
        """See ``MethodConfig.health_metrics``: the error is a distance from what is learned."""
        return {"student_loss": "flow_map_error"}


def flow_map_problems(run: PlannedRun) -> Iterator[Problem]:
    """Yield why the student of ``run`` can be no flow map, if it cannot."""
    low, high = run.time_limits.get(STUDENT.name, (0.0, MAX_T))
    if (run.experts and STUDENT.name in run.experts) or (low, high) != (0.0, MAX_T):
        yield Problem(
            (),
            "'student' is an expert for some t, or has several of them, and a flow map goes from "
            "any t to any r in one call. Give it a model of one expert",
        )
    if run.has_past(STUDENT.name):
        yield Problem(
            (),
            "'student' is causal (causal.roles), and here flow maps are of whole clips. Take it "
            "out of causal.roles",
        )
