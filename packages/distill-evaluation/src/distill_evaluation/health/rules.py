"""The rules: from numbers of a run to findings. Pure functions, no torch.

A rule looks at the newest checks alone and says what is wrong now; whoever calls it knows what was
said before. A signal that a run does not measure is never wrong.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

from attrs import frozen

from distill_evaluation.health.config import (
    Action,
    CollapseRule,
    DiscriminatorRule,
    GradientsRule,
    HealthConfig,
    LossesRule,
    MotionRule,
    NormaliserRule,
    SaturationRule,
    StillWeightsRule,
)
from distill_evaluation.health.history import History

TEACHER_FIRST = ("teacher", "data")
DATA_FIRST = ("data", "teacher")

NEARLY_GREY = 0.05
"""Least saturation of a reference that a multiple of means something."""
STILL = 0.02
"""Least difference of neighbouring frames, as a share of the contrast within them, of clips that
move at all."""
FEWEST_BEFORE = 3
"""Checks that a median needs."""

TITLES = {"teacher": "the teacher's", "data": "the data's"}


@frozen(kw_only=True)
class Finding:
    """What a rule has against the newest checks.

    Attributes:
        rule: its name in ``HealthConfig``.
        signal: name of the number.
        message: one sentence for a person: what is seen, the likely cause, the way out.
        value: newest value of the signal.
        threshold: what it passed, in the unit of the value.
        reference: what the threshold is relative to; None: the threshold is a limit by itself.
        subject: whose it is where a rule watches several (a role, a loss); findings of one rule
            and subject are one alarm.
    """

    rule: str
    action: Action
    signal: str
    message: str
    value: float
    threshold: float
    reference: float | None
    subject: str = ""

    @property
    def alarm(self) -> str:
        """Name of the alarm that it is of."""
        return f"{self.rule} of {self.subject}" if self.subject else self.rule


def find(config: HealthConfig, history: History) -> Iterator[Finding]:
    """Yield what all rules that are on have against the newest checks."""
    patience = config.patience
    rules = (  # generators: one of a rule that is off never begins
        (config.collapse.action, _collapse(config.collapse, history, patience)),
        (config.saturation.action, _saturation(config.saturation, history, patience)),
        (config.motion.action, _motion(config.motion, history, patience)),
        (config.still_weights.action, _still_weights(config.still_weights, history, patience)),
        (config.gradients.action, _gradients(config.gradients, history, patience)),
        (config.losses.action, _losses(config.losses, history, patience)),
        (config.normaliser.action, _normaliser(config.normaliser, history, patience)),
        (config.discriminator.action, _discriminator(config.discriminator, history, patience)),
    )
    for action, findings in rules:
        if action != "off":
            yield from findings


# -- clips ----------------------------------------------------------------------------------------


def _collapse(rule: CollapseRule, history: History, patience: int) -> Iterator[Finding]:
    cause = (
        "most often the student's learning rate is too high for its critic or its batch, so lower "
        "it, or give the critic more updates for each of the student's"
    )
    relative = _Relative(rule="collapse", action=rule.action, history=history, patience=patience)
    yield from relative.below(
        "variety",
        rule.variety,
        TEACHER_FIRST[:1],
        f"clips of one prompt differ by {{share}} of what {{whose}} do, as if there were one clip "
        f"a prompt: {cause}",
    )
    yield from relative.below(
        "latent_std",
        rule.latent_std,
        DATA_FIRST,
        f"the student's latents spread by {{share}} of {{whose}}, so its clips lose their detail: "
        f"{cause}",
    )
    for signal in _named(history, "teacher_distance"):
        yield from relative.above(
            signal,
            rule.teacher_distance,
            TEACHER_FIRST,
            "the teacher would change {times} as much of the student's clips as of {whose}, which "
            f"are unlike anything it makes: {cause}",
        )


def _saturation(rule: SaturationRule, history: History, patience: int) -> Iterator[Finding]:
    cause = (
        "most often the teacher's guidance is too high (codes that write c + s (c - u) mean s + 1 "
        "here), so lower it, or stop at an earlier checkpoint, where the student was milder"
    )
    relative = _Relative(rule="saturation", action=rule.action, history=history, patience=patience)
    yield from relative.above(
        "latent_std",
        rule.latent_std,
        DATA_FIRST,
        f"the student's latents spread {{times}} as far as {{whose}}, which burns out: {cause}",
    )
    yield from relative.above(
        "contrast",
        rule.contrast,
        DATA_FIRST,
        f"the student's clips have {{times}} the contrast of {{whose}}: {cause}",
    )
    grey = history.reference("saturation", DATA_FIRST)
    if grey is not None and grey[1] >= NEARLY_GREY:
        yield from relative.above(
            "saturation",
            rule.saturation,
            DATA_FIRST,
            f"the student's colours are {{times}} as pure as {{whose}}: {cause}",
        )
    yield from relative.exceeds(
        "clipped",
        rule.clipped,
        f"{{more:.0%}} more of the student's pixels are black or white than of {{whose}}: {cause}",
    )
    std = history.reference("latent_std", DATA_FIRST)
    if std is not None:
        yield from relative.exceeds(
            "latent_mean",
            rule.latent_mean * std[1],
            "the mean of the student's latents is {more:.2g} away from {whose}, a cast of colour "
            f"or brightness: {cause}",
            either_way=True,
        )


def _motion(rule: MotionRule, history: History, patience: int) -> Iterator[Finding]:
    relative = _Relative(rule="motion", action=rule.action, history=history, patience=patience)
    yield from relative.below(
        "motion",
        rule.motion,
        TEACHER_FIRST,
        "neighbouring frames of the student differ by {share} of what {whose} do, so clips stand "
        "still: most often a data set or a prompt list without motion, a guidance that is too "
        "high, or too few steps, so look at the data, lower the guidance, or add a step",
    )
    yield from _still_data(rule, history)


def _still_data(rule: MotionRule, history: History) -> Iterator[Finding]:
    """Compare the data's own motion with the teacher's, or with their contrast where there is no
    teacher: what moves a picture's contrast within a clip changes some of it in each frame."""
    motion = history.reference("motion", ("data",))
    teacher = history.reference("motion", ("teacher",))
    contrast = history.reference("contrast", ("data",))
    if motion is None or contrast is None:
        return
    if teacher is not None:
        reference, least, of_what = teacher[1], rule.data, "what the teacher's do"
    else:
        reference, least, of_what = contrast[1], STILL, "their contrast"
    if motion[1] < least * reference:
        yield Finding(
            rule="motion",
            action=rule.action,
            signal="data/motion",
            subject="data",
            message=(
                f"neighbouring frames of the data differ by {motion[1] / reference:.0%} of "
                f"{of_what}: the data set hardly moves, and a student that is shown it will not "
                "either, so take clips with motion, or of fewer frames a second"
            ),
            value=motion[1],
            threshold=least * reference,
            reference=reference,
        )


# -- training -------------------------------------------------------------------------------------


def _still_weights(rule: StillWeightsRule, history: History, patience: int) -> Iterator[Finding]:
    for signal in _named(history, "moved"):
        newest = history.newest(signal, patience)
        if newest and all(value < rule.moved for value in newest):
            who = signal.partition("/")[2]
            yield Finding(
                rule="still_weights",
                action=rule.action,
                signal=signal,
                subject=who,
                message=(
                    f"the weights of {who} moved by {newest[-1]:.1g} of themselves since the last "
                    "check, so it learns nothing, and a critic that stands still leads its student "
                    "astray: its learning rate is far too low, or its weights are kept in a "
                    "precision that swallows the steps"
                ),
                value=newest[-1],
                threshold=rule.moved,
                reference=None,
            )


def _gradients(rule: GradientsRule, history: History, patience: int) -> Iterator[Finding]:
    for signal in _named(history, "grad_norm"):
        before = history.values(signal)[:-patience]
        newest = history.newest(signal, patience)
        if len(before) < FEWEST_BEFORE or not newest:
            continue
        usual = statistics.median(before)
        if usual > 0 and all(value > rule.rise * usual for value in newest):
            who = signal.partition("/")[2]
            yield Finding(
                rule="gradients",
                action=rule.action,
                signal=signal,
                subject=who,
                message=(
                    f"the gradients of {who} are {newest[-1] / usual:.0f} times as large as "
                    f"usual{_by_main_loss(history, who)}: "
                    "its learning rate is too high, or a batch is damaged, so lower the rate, warm "
                    "it up, or go back to the checkpoint before"
                ),
                value=newest[-1],
                threshold=rule.rise * usual,
                reference=usual,
            )


def _by_main_loss(history: History, who: str) -> str:
    """Say which loss contributes most to the gradients of a module; empty: it has one loss, or none
    was measured by itself."""
    norms = {
        name.rpartition("/")[2]: history.values(name)[-1]
        for name in _named(history, f"loss_grad_norm/{who}")
    }
    return f", most of them by {max(norms, key=lambda n: norms[n])}" if len(norms) > 1 else ""


def _losses(rule: LossesRule, history: History, patience: int) -> Iterator[Finding]:
    texts = {
        "critic_loss": (
            "the critic's loss is {times:.1f} times its least so far, so it has lost the student's "
            "clips, and leads the student by what they were: lower the student's learning rate, or "
            "raise the critic's, or its updates for each of the student's"
        ),
        "student_loss": (
            "the student's loss is {times:.1f} times its least so far, so it forgets what it had "
            "learned: lower its learning rate, or warm it up"
        ),
    }
    for signal, text in texts.items():
        values, newest = history.values(signal), history.newest(signal, patience)
        least = min(values[:-patience], default=0.0)
        if least > 0 and newest and all(value > rule.rise * least for value in newest):
            yield Finding(
                rule="losses",
                action=rule.action,
                signal=signal,
                subject=signal.removesuffix("_loss"),
                message=text.format(times=newest[-1] / least),
                value=newest[-1],
                threshold=rule.rise * least,
                reference=least,
            )


def _normaliser(rule: NormaliserRule, history: History, patience: int) -> Iterator[Finding]:
    values, newest = history.values("normaliser"), history.newest("normaliser", patience)
    if not newest or values[0] <= 0:
        return
    first = values[0]
    cases = (
        (
            all(value < rule.fall * first for value in newest),
            rule.fall * first,
            "so the division blows up what little the teacher would change: the student follows "
            "noise, so stop at an earlier checkpoint, or lower its learning rate",
        ),
        (
            all(value > rule.rise * first for value in newest),
            rule.rise * first,
            "so the student's clips have left what the teacher makes: lower its learning rate, or "
            "give the critic more updates for each of the student's",
        ),
    )
    for is_wrong, threshold, meaning in cases:
        if is_wrong:
            yield Finding(
                rule="normaliser",
                action=rule.action,
                signal="normaliser",
                message=(
                    f"what DMD's gradient is divided by is {newest[-1] / first:.2g} times what it "
                    f"was at the start, {meaning}"
                ),
                value=newest[-1],
                threshold=threshold,
                reference=first,
            )


def _discriminator(rule: DiscriminatorRule, history: History, patience: int) -> Iterator[Finding]:
    signal = "discriminator_accuracy"
    points, newest = history.series.get(signal, []), history.newest(signal, patience)
    if not newest or points[-1].iteration < history.steps / 10:
        return
    cases = (
        (
            all(value < rule.low for value in newest),
            rule.low,
            "so it learns nothing, and neither does the student from it: raise its learning rate, "
            "or lower the weight of its penalty",
        ),
        (
            all(value > rule.high for value in newest),
            rule.high,
            "so it is too far ahead for its gradient to help the student: lower its learning rate, "
            "or raise the weight of its penalty",
        ),
    )
    for is_wrong, threshold, meaning in cases:
        if is_wrong:
            yield Finding(
                rule="discriminator",
                action=rule.action,
                signal=signal,
                message=f"the discriminator is right in {newest[-1]:.0%} of all cases, {meaning}",
                value=newest[-1],
                threshold=threshold,
                reference=None,
            )


# -- comparison -----------------------------------------------------------------------------------


@frozen(kw_only=True)
class _Relative:
    """Compares the newest numbers of the student with a reference.

    In texts, ``{share}`` and ``{times}`` stand for value / reference, ``{more}`` for value -
    reference, and ``{whose}`` for whose the reference is.
    """

    rule: str
    action: Action
    history: History
    patience: int

    def below(
        self, signal: str, share: float, preferred: Sequence[str], text: str
    ) -> Iterator[Finding]:
        """Yield a finding where all of the newest are below ``share`` of the reference."""
        yield from self._compare(
            signal, preferred, text, lambda reference: (share * reference, lambda v, t: v < t)
        )

    def above(
        self, signal: str, times: float, preferred: Sequence[str], text: str
    ) -> Iterator[Finding]:
        """Yield a finding where all of the newest are above ``times`` the reference."""
        yield from self._compare(
            signal, preferred, text, lambda reference: (times * reference, lambda v, t: v > t)
        )

    def exceeds(
        self, signal: str, distance: float, text: str, *, either_way: bool = False
    ) -> Iterator[Finding]:
        """Yield a finding where all of the newest are farther above the reference than ``distance``
        (``either_way``: or below it)."""

        def bound(reference: float) -> tuple[float, Callable[[float, float], bool]]:
            def is_far(value: float, _threshold: float) -> bool:
                away = value - reference
                return (abs(away) if either_way else away) > distance

            return reference + distance, is_far

        yield from self._compare(signal, DATA_FIRST, text, bound)

    def _compare(
        self,
        signal: str,
        preferred: Sequence[str],
        text: str,
        bound: Callable[[float], tuple[float, Callable[[float, float], bool]]],
    ) -> Iterator[Finding]:
        found = self.history.reference(signal, preferred)
        newest = self.history.newest(signal, self.patience)
        if found is None or not newest:
            return
        owner, reference = found
        threshold, is_wrong = bound(reference)
        if not all(is_wrong(value, threshold) for value in newest):
            return
        value = newest[-1]
        ratio = value / reference if reference else float("inf")
        yield Finding(
            rule=self.rule,
            action=self.action,
            signal=signal,
            message=text.format(
                share=f"{ratio:.0%}",
                times=f"{ratio:.1f} times",
                more=value - reference,
                whose=TITLES[owner],
            ),
            value=value,
            threshold=threshold,
            reference=reference,
        )


def _named(history: History, kind: str) -> list[str]:
    """Return names of the series ``<kind>/...``."""
    return [name for name in history.series if name.startswith(f"{kind}/")]
