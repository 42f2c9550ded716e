"""Options of consistency distillation. No torch here: run files are checked without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol, get_args

from attrs import Attribute, field, frozen
from attrs.validators import in_, optional
from distill_protocols import ONE_TENSOR, PlannedRun, Problem, RoleNeed, SamplerSpec
from distill_protocols.validators import above, at_least, within

from distill_methods.distribution_matching.config import is_unguided
from distill_methods.latent_config import can_be_left_early
from distill_methods.roles import STUDENT
from distill_methods.teachers.config import NEGATIVE_GUIDANCE, DefaultGuidance, TeachersConfig
from distill_methods.time_sampling import TimeSampling, fraction_within, probability_within


def _is_within_the_grid(config: Discrete, _attribute: object, value: int) -> None:
    if value > config.steps:
        raise ValueError(
            f"{value} is more than the grid's steps ({config.steps}): each pair would end at the "
            "data, and the student learn one step of its teacher. Use at most steps"
        )


def _has_an_effect(config: Discrete, attribute: Attribute[float], value: float) -> None:
    if config.loss == "l2" and value != attribute.default:
        raise ValueError(
            f"{value} has no effect: loss: l2 has no such number. Set loss: huber, or leave it out"
        )


Derivative = Literal["jvp", "finite_difference"]
"""How the student is differentiated along the teacher's trajectory: in forward mode, or by the
difference of two calls."""


def _differences_have_an_effect(
    config: Continuous, attribute: Attribute[float], value: float
) -> None:
    if config.derivative == "jvp" and value != attribute.default:
        raise ValueError(
            f"{value} has no effect: derivative: jvp takes no difference. Set derivative: "
            "finite_difference, or leave it out"
        )


class HasForms(Protocol):
    """A config that states one form of the consistency loss."""

    @property
    def discrete(self) -> Discrete | None: ...


def is_the_only_form(config: HasForms, _attribute: object, value: Continuous | None) -> None:
    """Validate ``continuous``: ``discrete`` is not stated beside it."""
    if value is not None and config.discrete is not None:
        raise ValueError(
            "discrete and continuous are both stated, and a student is trained by one of them. "
            "Leave one out"
        )


@frozen(kw_only=True)
class Discrete:
    """Consistency between neighbours of a grid of times (LCM, Luo et al. 2023).

    Attributes:
        steps: N: points of the grid above 0, ``t_n = 1000 S_shift(1 - n / N)``. LCM has 50, rCM's
            discrete form 48.
        shift: flow shift of the grid.
        skip: k: grid points that the teacher's one Euler step covers. A larger k converges faster,
            and to a coarser teacher: LCM has 20 of 50, rCM's discrete form 1 of 48.
        loss: l2: ``mean |d|^2``. huber: ``mean (sqrt(d^2 + c^2) - c)``, in which single large
            differences count less (LCM).
        huber_c: c of the latter; LCM's 0.001.
    """

    steps: int = field(
        default=48, validator=at_least(1, "there would be no time to learn at; LCM has 50")
    )
    shift: float = field(
        default=5.0,
        validator=above(0, "S_k(u) = k u / (1 + (k - 1) u) is a noise level for positive k only"),
    )
    skip: int = field(
        default=1,
        validator=[at_least(1, "a pair must be of two different times"), _is_within_the_grid],
    )
    loss: Literal["l2", "huber"] = field(default="huber", validator=in_(("l2", "huber")))
    huber_c: float = field(
        default=0.001,
        validator=[above(0, "at 0 the gradient has a step at d = 0"), _has_an_effect],
    )

    @property
    def levels(self) -> tuple[float, ...]:
        """t of the grid's points, falling; 0 is not among them."""
        sigmas = SamplerSpec(steps=self.steps, shift=self.shift).sigmas()
        return tuple(1000 * sigma for sigma in sigmas)

    @property
    def pairs(self) -> tuple[tuple[float, float], ...]:
        """(t, t'): each grid point and the one at which the teacher's step from it ends, or 0."""
        ends = (*self.levels[self.skip :], *[0.0] * self.skip)
        return tuple(zip(self.levels, ends, strict=True))

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Capabilities that the adapter must have for this form."""
        return ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that the loss gives beside itself."""
        return ()

    def probability_within(self, low: float, high: float) -> float:
        """Return the probability that the student is trained at a t in [low, high)."""
        return fraction_within(self.levels, low, high)


@frozen(kw_only=True)
class Continuous:
    """The limit of neighbours that are infinitely near (sCM, Lu & Song 2024).

    Attributes:
        time: the t at which the student is trained; rCM's for Wan 2.1 1.3B (for 14B its mean is
            1.5).
        tangent_warmup: student updates over which the derivative of the student is raised from 0
            to its full weight; 0: full from the first. rCM: 1000 for 1.3B, 0 for 14B; sCM: 10000.
        tangent_c: c in ``g / (|g| + c)``, |g| over a whole sample; sCM's and rCM's 0.1.
        prior_weight: none, or inverse_noise: each sample's loss is multiplied by ``(1 - s) / s``,
            which is sCM's ``1 / tan(t)`` and favours low noise; below t = 1 it is that of 1.
        derivative: jvp: in forward mode, exact, by one call whose attention runs without a fused
            kernel. finite_difference: by two calls in fp32 as all others are made, with whatever
            kernel, sharding or checkpointing; FastGen's ``use_jvp_finite_diff``, rCM's ``fd_type``.
        difference: h of the latter, in units of t: ``(v(t + h) - v(t - h)) / 2h``. FastGen takes
            0.001 t, rCM 0.0001 of its angle, which is about 0.1 here.
    """

    time: TimeSampling = field(default=TimeSampling(distribution="logit_normal", mean=0.7, std=1.6))
    tangent_warmup: int = field(
        default=1000, validator=at_least(0, "it counts student updates; 0 is none")
    )
    tangent_c: float = field(
        default=0.1, validator=above(0, "a sample without error would be divided by 0")
    )
    prior_weight: Literal["none", "inverse_noise"] = field(
        default="none", validator=in_(("none", "inverse_noise"))
    )
    derivative: Derivative = field(default="jvp", validator=in_(get_args(Derivative)))
    difference: float = field(
        default=0.1,
        validator=[
            within(0.01, 10, "a shorter one is lost in rounding, a longer one is no derivative"),
            _differences_have_an_effect,
        ],
    )

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Capabilities that the adapter must have for this form."""
        return (ONE_TENSOR, *(("supports_jvp",) if self.derivative == "jvp" else ()))

    def warmup_at(self, update: int) -> float:
        """Return the weight of the derivative in the student's ``update`` (from 1)."""
        return min(1.0, update / self.tangent_warmup) if self.tangent_warmup else 1.0

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that the loss gives beside itself."""
        return ("tangent_rms",)

    def probability_within(self, low: float, high: float) -> float:
        """Return the probability that the student is trained at a t in [low, high)."""
        return probability_within(self.time, low, high)


@frozen(kw_only=True)
class ConsistencyConfig(TeachersConfig):
    """Consistency distillation (Song et al. 2023; LCM, Luo et al. 2023; sCM, Lu & Song 2024).

    Attributes:
        guidance_scale: w of the teacher, ``u + w (c - u)``; it is fixed, and becomes part of the
            student, which is then called once.
        guidance_scale_2: w of the teacher's expert for the low noise levels, where it has two;
            left out, the same.
        teachers: several teachers by role, in the place of the one role ``teacher``: the trajectory
            is that of the weighted sum of their guided predictions.
        discrete: the loss between neighbours on a grid; the default where neither is stated.
        continuous: the loss without a grid; with ``derivative: jvp`` it needs an adapter with
            ``supports_jvp``.
        student_sampler: how the student is sampled in validation and export. Its guidance must
            be 1.
    """

    guidance_scale: float = field(default=5.0, validator=at_least(0, NEGATIVE_GUIDANCE))
    guidance_scale_2: float | None = field(
        default=None, validator=optional(at_least(0, NEGATIVE_GUIDANCE))
    )
    discrete: Discrete | None = None
    continuous: Continuous | None = field(default=None, validator=is_the_only_form)
    student_sampler: SamplerSpec = field(
        default=SamplerSpec(steps=4, shift=5.0, stochastic=True),
        validator=[is_unguided, can_be_left_early],
    )

    @property
    def form(self) -> Discrete | Continuous:
        """The form that is used."""
        return self.continuous or self.discrete or Discrete()

    @property
    def roles(self) -> tuple[RoleNeed, ...]:
        """Student and teachers."""
        return (STUDENT, *self.teacher_roles)

    @property
    def default_guidance(self) -> DefaultGuidance:
        """See ``TeachersConfig.default_guidance``."""
        return DefaultGuidance(self.guidance_scale, self.guidance_scale_2, "guidance_scale_2")

    @property
    def needs_negative(self) -> bool:
        """Whether a teacher is called with a negative condition."""
        return self.has_guided_teacher

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Capabilities that the adapter must have."""
        guided = ("supports_cfg",) if self.needs_negative else ()
        return ("pred:v", "pred:x0", *self.form.capabilities, *guided)

    def problems(self, run: PlannedRun) -> Iterator[Problem]:
        """See ``MethodConfig.problems``."""
        yield from super().problems(run)
        yield from form_problems(self.form, run)

    def metrics(self, iteration: int) -> tuple[str, ...]:
        """See ``MethodConfig.metrics``."""
        return (*super().metrics(iteration), *self.form.metrics)

    def update_share(self, role: str, low: float, high: float) -> float:
        """See ``MethodConfig.update_share``."""
        return self.form.probability_within(low, high)


def form_problems(form: Discrete | Continuous, run: PlannedRun) -> Iterator[Problem]:
    """Yield why ``form`` cannot be used with the models of ``run``, if it cannot."""
    low, _ = run.time_limits.get(STUDENT.name, (0.0, 0.0))
    if low > 0:
        yield Problem((), WITHOUT_LOW_NOISE)
    if not isinstance(form, Continuous):
        return
    if run.experts and STUDENT.name in run.experts:
        yield Problem("continuous", CONTINUOUS_WITH_EXPERTS)
    if (student := run.roles.get(STUDENT.name)) is None:
        return
    if form.derivative == "finite_difference" and student.precision != "fp32":
        yield Problem(
            ("continuous", "derivative"),
            f"'student' computes in {student.precision}, and the difference of two of its calls is "
            "rounding error: on the tiny Wan it was off by 70 % and more, whatever the step. Set "
            "derivative: jvp, or precision: fp32 of 'student'",
        )
    backend = student.attention_backend
    if form.derivative == "jvp" and backend is not None and backend not in PLAIN_BACKENDS:
        yield Problem(
            ("continuous", "derivative"),
            f"jvp differentiates each layer in forward mode, and the kernel {backend!r} of "
            "'student' (attention_backend) has no such rule. Set derivative: finite_difference, "
            "which makes calls like any other, or leave attention_backend out",
        )


PLAIN_BACKENDS = ("native", "_native_math", "_native_flash", "_native_efficient", "_native_cudnn")
"""Attention backends that call torch's own function, which a call in forward mode replaces."""
WITHOUT_LOW_NOISE = (
    "'student' has its model's expert for high noise levels alone, and the chain of targets ends "
    "at data, which only the other one reaches: it would be consistent with itself, and end "
    "anywhere. Give it both experts, or the one for low noise levels"
)
CONTINUOUS_WITH_EXPERTS = (
    "'student' has two experts, and the derivative at a t knows nothing of the other side of "
    "their boundary: the one for high noise levels would be consistent with itself alone, and "
    "end anywhere. Use discrete, whose pairs cross the boundary, or one expert"
)
