"""Configuration of the `health` callback: what is measured, and the rules. Imports no torch."""

from __future__ import annotations

from typing import Literal, get_args

from attrs import field, frozen
from attrs.validators import in_, optional
from distill_protocols import SamplerSpec
from distill_protocols.validators import above, at_least, within

Action = Literal["warn", "keep", "stop", "off"]
"""What an alarm does. warn: it is said and written down. keep: also, the newest checkpoint of
before the first sign stays, whatever else decides which are deleted. stop: also, the run stops with
a checkpoint, as on a signal. off: the rule is not applied."""

_IS_ACTION = in_(get_args(Action))
_shrinks = within(0, 1, "it is a share of the reference, and a rule for what has shrunk")
_grows = at_least(1, "it is a multiple of the reference, and a rule for what has grown")


@frozen(kw_only=True)
class CollapseRule:
    """The student makes one clip of a prompt, or clips that are none: mode collapse.

    Attributes:
        action: warn, keep, stop or off.
        variety: least mean distance between clips of one prompt (in latents, relative to their
            spread), as a share of the teacher's from the same noise. A distilled student has less
            of it than its teacher (DMD2, Yin et al. 2024, section 5; Phased DMD adds an anchor for
            it), for which this leaves room.
        latent_std: least standard deviation of latents, as a share of that of the data.
        teacher_distance: most that the teacher would change of the student's clips, as a multiple
            of what it would change of its own: noised, and predicted again. Clips of a run that
            diverges are tens of times as far.
    """

    action: Action = field(default="warn", validator=_IS_ACTION)
    variety: float = field(default=0.4, validator=_shrinks)
    latent_std: float = field(default=0.5, validator=_shrinks)
    teacher_distance: float = field(default=3.0, validator=_grows)


@frozen(kw_only=True)
class SaturationRule:
    """Colours burn out: too much contrast, colour, or spread of latents.

    Attributes:
        action: warn, keep, stop or off.
        latent_std: most standard deviation of latents, as a multiple of that of the data, or of the
            teacher where the data are captions. Guidance widens them, also in a healthy student: a
            third more is what tiny students pass on their way, and one under three times the
            guidance has two thirds more.
        latent_mean: farthest that the mean of latents may be from the data's, in standard
            deviations of the data: a cast of colour or brightness.
        contrast: most spread of brightness within frames, as a multiple of that of the data.
        saturation: most purity of colours, likewise; not watched where the data are nearly grey.
        clipped: most that the share of black and white values may exceed the data's by.
    """

    action: Action = field(default="warn", validator=_IS_ACTION)
    latent_std: float = field(default=1.5, validator=_grows)
    latent_mean: float = field(
        default=0.5, validator=above(0, "it is a distance in standard deviations")
    )
    contrast: float = field(default=1.3, validator=_grows)
    saturation: float = field(default=1.6, validator=_grows)
    clipped: float = field(default=0.15, validator=within(0, 1, "it is a difference of shares"))


@frozen(kw_only=True)
class MotionRule:
    """Clips stand still.

    Attributes:
        action: warn, keep, stop or off.
        motion: least mean difference of neighbouring frames, as a share of the teacher's from the
            same prompts. Few-step students of large teachers are known for slow motion
            (Wan2.2-Lightning 13 and 32); half of it may still be a matter of taste.
        data: the same of the data set's own clips. A student that is shown them as real, by a
            discriminator or as the target, will stand still.
    """

    action: Action = field(default="warn", validator=_IS_ACTION)
    motion: float = field(default=0.4, validator=_shrinks)
    data: float = field(default=0.4, validator=_shrinks)


@frozen(kw_only=True)
class StillWeightsRule:
    """A role that is trained hardly moves: a dead critic, a rate that is too small, or weights in a
    precision that swallows its steps.

    Attributes:
        action: warn, keep, stop or off.
        moved: least relative change of a role's weights from one check to the next. A rate of 4e-7,
            the smallest that published recipes have (Self-Forcing's critic), moves weights of a
            spread of .02 by 1e-4 in 50 steps even where these point nowhere.
    """

    action: Action = field(default="warn", validator=_IS_ACTION)
    moved: float = field(
        default=1e-5, validator=above(0, "a role that stands still moves by exactly 0")
    )


@frozen(kw_only=True)
class GradientsRule:
    """Gradients of a role explode.

    Attributes:
        action: warn, keep, stop or off.
        rise: largest gradient norm, before clipping, as a multiple of the median of the checks
            before.
    """

    action: Action = field(default="warn", validator=_IS_ACTION)
    rise: float = field(default=10.0, validator=_grows)


@frozen(kw_only=True)
class LossesRule:
    """A loss whose rise means harm rises: that of the critic, which loses the student's clips, or
    of a student that learns a fixed target. DMD's own says nothing.

    Attributes:
        action: warn, keep, stop or off.
        rise: largest mean of a loss, as a multiple of its least mean so far.
    """

    action: Action = field(default="warn", validator=_IS_ACTION)
    rise: float = field(default=4.0, validator=_grows)


@frozen(kw_only=True)
class NormaliserRule:
    """What DMD's gradient is divided by leaves its range: it falls where the teacher finds nothing
    to change, and the division blows up noise; it rises where clips are not the teacher's.

    Attributes:
        action: warn, keep, stop or off.
        fall: least mean, as a share of the first check's.
        rise: largest mean, as a multiple of the first check's.
    """

    action: Action = field(default="warn", validator=_IS_ACTION)
    fall: float = field(default=0.25, validator=_shrinks)
    rise: float = field(default=4.0, validator=_grows)


@frozen(kw_only=True)
class DiscriminatorRule:
    """A discriminator that learns nothing, or is so far ahead that its gradient helps nobody.

    Attributes:
        action: warn, keep, stop or off.
        low: least accuracy, once a tenth of the run is over; guessing is .5.
        high: most accuracy.
    """

    action: Action = field(default="warn", validator=_IS_ACTION)
    low: float = field(default=0.52, validator=within(0, 1, "it is a share"))
    high: float = field(default=0.98, validator=within(0, 1, "it is a share"))


RULES = (
    CollapseRule, SaturationRule, MotionRule, StillWeightsRule, GradientsRule, LossesRule,
    NormaliserRule, DiscriminatorRule,
)  # fmt: skip
"""The classes of all rules."""


@frozen(kw_only=True)
class HealthConfig:
    """Watches what is known to go wrong in a distillation while the loss says nothing, and warns in
    a sentence, with the likely cause and the way out.

    A few times in a run the student (live weights) samples a few clips of the data set's first
    prompts, always from the same noise; the teacher does so once, before the first update. Their
    numbers, and means of what the method measures since the last time, go through the rules. No
    threshold is a fixed number: each is relative to the teacher, the data, or the run itself.
    The run goes on as if nothing had been sampled.

    Attributes:
        checks: how often in a run, at equal distances. There are fewer where they would cost more
            than ``share`` of the run's model calls.
        share: most model calls of all checks, as a share of the training's.
        every_steps: iterations between two checks, instead of both.
        prompts: samples of the data set whose conditions are used.
        clips_per_prompt: clips of each, from noise of their own; 1 measures no variety.
        seed: of the noise, apart from the run's own generators.
        role: whose clips are watched.
        teacher_sampler: how the teacher samples its clips; left out, with the guidance that the
            student learns, in ``teacher_steps`` Euler steps with a shift of 3.
        teacher_steps: see there.
        times: t at which the teacher is asked how much it would change of a clip.
        patience: so many checks in a row must agree before there is an alarm.
        collapse, saturation, motion, still_weights, gradients, losses, normaliser, discriminator:
            the rules.
    """

    checks: int = field(
        default=20, validator=at_least(1, "a rule needs a number. Turn health off instead")
    )
    share: float = field(
        default=0.015, validator=above(0, "nothing could be sampled. Turn health off instead")
    )
    every_steps: int | None = field(
        default=None, validator=optional(at_least(1, "it is an interval. Leave it out"))
    )
    prompts: int = field(default=4, validator=at_least(1, "a clip needs a prompt"))
    clips_per_prompt: int = field(default=2, validator=at_least(1, "a prompt needs a clip"))
    seed: int = field(default=0, validator=at_least(0, "seeds count from 0; take any other"))
    role: str = "student"
    teacher_sampler: SamplerSpec | None = None
    teacher_steps: int = field(default=8, validator=at_least(1, "a clip takes a model call"))
    times: tuple[float, ...] = field(default=(300.0, 700.0))
    patience: int = field(default=2, validator=at_least(1, "an alarm needs a check"))
    collapse: CollapseRule = field(factory=CollapseRule)
    saturation: SaturationRule = field(factory=SaturationRule)
    motion: MotionRule = field(factory=MotionRule)
    still_weights: StillWeightsRule = field(factory=StillWeightsRule)
    gradients: GradientsRule = field(factory=GradientsRule)
    losses: LossesRule = field(factory=LossesRule)
    normaliser: NormaliserRule = field(factory=NormaliserRule)
    discriminator: DiscriminatorRule = field(factory=DiscriminatorRule)

    @times.validator
    def _check_times(self, attribute: object, value: tuple[float, ...]) -> None:
        if outside := [t for t in value if not 0 < t < 1000]:
            raise ValueError(
                f"{outside[0]:g} must lie between 0 and 1000: at 0 the teacher sees the clip "
                "itself, and at 1000 nothing of it"
            )
