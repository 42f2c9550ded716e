"""Options of matching clips that the student makes as a whole. No torch here: run files are checked
without it."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import field, frozen
from attrs.validators import optional
from distill_protocols import PlannedRun, Problem, RoleSpec
from distill_protocols.validators import above, at_least

from distill_methods.distribution_matching.config import MatchingConfig
from distill_methods.exits import exit_weights, weight_within
from distill_methods.roles import CRITIC, STUDENT
from distill_methods.time_sampling import MAX_T

CAUSAL_ANCHOR = (
    "{0} leads the student's first call to the teacher's clip, which is made as a whole, and this "
    "student makes a clip chunk by chunk. Leave it out, or train a student that is not causal"
)
NO_STEP_BESIDE_THE_ANCHOR = (
    "the anchor takes the student's first step from the matching, and of the steps of the expert "
    "that is called there no other is ever the exit. Let student_sampler take two steps at its "
    "noise levels and exit give the second a weight, or leave the anchor out"
)
CAUSAL_INTERPOLATION = (
    "{0} takes the student's weights into the critic, and those of a causal student see the past "
    "alone: the critic calls them on whole clips. Leave it out, or train a student that is not "
    "causal"
)


def _is_step_of_the_teacher(config: AnchorConfig, _attribute: object, value: int) -> None:
    if not 1 <= value <= config.teacher_steps:
        raise ValueError(
            f"{value} must be one of the teacher's steps, 1 .. teacher_steps "
            f"({config.teacher_steps}): the anchor is where the teacher stands after so many"
        )


@frozen(kw_only=True)
class AnchorConfig:
    """The diversity anchor: the student's first call learns the way of the teacher, from noise to
    where its own sampling stands after some steps.

    Attributes:
        weight: weight of the anchor's loss in the student's.
        teacher_steps: steps of the teacher's sampler (Euler), with the guidance of the scores.
        anchor_step: after how many of them it is left; fewer cost fewer calls, more look further
            ahead.
        shift: flow shift of that sampler.
    """

    weight: float = field(
        default=0.05, validator=above(0, "the first step is trained by the anchor alone")
    )
    teacher_steps: int = field(default=40, validator=at_least(1, "the teacher would not move"))
    anchor_step: int = field(default=10, validator=_is_step_of_the_teacher)
    shift: float = field(
        default=5.0,
        validator=above(0, "S_k(u) = k u / (1 + (k - 1) u) is a noise level for positive k only"),
    )


def _leaves_exits(config: WholeClipConfig, _attribute: object, _value: AnchorConfig | None) -> None:
    sampler = config.student_sampler
    if sampler.timesteps is not None and sampler.timesteps[0] != 1000:
        raise ValueError(
            f"student_sampler begins at t = {sampler.timesteps[0]:g}, and an anchor is a way that "
            "begins at noise. Let timesteps begin with 1000, or leave the anchor out"
        )
    if not sum(exit_weights(config.exit, sampler.steps)[1:]) > 0:
        raise ValueError(
            "the anchor alone trains the first step of student_sampler, and no later one is ever "
            "the exit, so nothing would be matched. Sample with two steps or more, and let exit "
            "give a later one a weight"
        )


def _is_share_of_a_turn(config: WholeClipConfig, _attribute: object, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(
            f"{value} must be in [0, 1), the student's share of the critic: at 1 the critic would "
            "be the student and learn nothing. SenseFlow's and LightX2V's is 0.03"
        )
    if value > 0 and config.critic_update == "alternate":
        raise ValueError(
            f"{value} moves the critic in the student's iterations, and with critic_update: "
            "alternate these are not its turn. Use critic_update: every_step, or leave this out"
        )


@frozen(kw_only=True)
class WholeClipConfig(MatchingConfig):
    """Options that DMD2 and Phased DMD add to those of distribution matching.

    Attributes:
        anchor: the first step of the student's sampler is trained by regression on the teacher's
            way, and by distribution matching no more, which keeps its diversity and motion (Phased
            DMD's code, LightX2V); left out: all steps are matched.
        critic_interpolation: l in ``critic <- (1 - l) critic + l student``, after each of the
            student's updates (implicit distribution alignment, IDA: SenseFlow, Ge et al. 2025);
            0: none. It needs ``critic_update: every_step``.
    """

    anchor: AnchorConfig | None = field(default=None, validator=optional(_leaves_exits))
    critic_interpolation: float = field(default=0.0, validator=_is_share_of_a_turn)

    @property
    def exit_weights(self) -> tuple[float, ...]:
        """See ``LatentMethodConfig.exit_weights``: with an anchor the first step is no exit."""
        weights = super().exit_weights
        if self.anchor is None:
            return weights
        later = weights[1:]
        return (0.0, *(len(weights) * weight / sum(later) for weight in later))

    def matches_beside_anchor(self, low: float, high: float) -> bool:
        """Return whether the expert for t in [low, high), the student's highest, is called in the
        first step and matched at a later one."""
        return (
            high == MAX_T and weight_within(self.student_levels, self.exit_weights, low, high) > 0
        )

    def metrics(self, iteration: int) -> tuple[str, ...]:
        """See ``MethodConfig.metrics``. Of a student of two experts the anchor is measured in the
        iterations of the one for high noise levels."""
        names = super().metrics(iteration)
        has_anchor = self.anchor is not None and STUDENT.name in self.turns(iteration)
        return (*names, "loss/anchor_loss") if has_anchor else names

    def problems(self, run: PlannedRun) -> Iterator[Problem]:
        """See ``MethodConfig.problems``."""
        yield from super().problems(run)
        is_causal = STUDENT.name in run.roles and run.has_past(STUDENT.name)
        if self.anchor is not None and is_causal:
            yield Problem("anchor", CAUSAL_ANCHOR.format("it"))
        low, high = run.time_limits.get(
            STUDENT.name, (run.boundaries.get(STUDENT.name, 0.0), MAX_T)
        )
        if self.anchor is not None and not self.matches_beside_anchor(low, high):
            yield Problem("anchor", NO_STEP_BESIDE_THE_ANCHOR)
        if self.critic_interpolation == 0:
            return
        if is_causal:
            yield Problem(
                "critic_interpolation", CAUSAL_INTERPOLATION.format(self.critic_interpolation)
            )
        elif STUDENT.name in run.roles and CRITIC.name in run.roles:
            yield from self._mismatches(run.roles[STUDENT.name], run.roles[CRITIC.name])

    def _mismatches(self, student: RoleSpec, critic: RoleSpec) -> Iterator[Problem]:
        """Yield what keeps the critic from holding a share of the student's weights."""
        if student.lora != critic.lora or (student.lora and student.path != critic.path):
            yield Problem(
                "critic_interpolation",
                f"{self.critic_interpolation} interpolates the weights that are trained, and "
                "student and critic train different ones. Give both the same lora on the same "
                "path, or none to either",
            )
