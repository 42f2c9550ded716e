"""The rules of health: what raises each alarm, what just does not, and that alarms are lasting."""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest
from distill_evaluation.health.config import HealthConfig
from distill_evaluation.health.history import History
from distill_evaluation.health.rules import Finding, find
from hypothesis import given
from hypothesis import strategies as st

CLIPS = {
    "latent_mean": 0.0, "latent_std": 1.0, "contrast": 0.2, "saturation": 0.3, "clipped": 0.05,
    "sharpness": 0.1, "motion": 0.04, "variety": 0.3,
    "teacher_distance/250": 0.1, "teacher_distance/500": 0.2, "teacher_distance/750": 0.3,
}  # fmt: skip
TRAINING = {
    "moved/student.transformer": 1e-3, "moved/critic.transformer": 1e-3,
    "grad_norm/student.transformer": 0.5, "critic_loss": 0.5, "student_loss": 0.2,
    "normaliser": 0.3, "discriminator_accuracy": 0.7,
}  # fmt: skip
HEALTHY = CLIPS | TRAINING


def history(*late: dict[str, float], references: Any = None, early: int = 4) -> History:
    """Make ``early`` healthy checks, and one more with each of ``late`` in its place."""
    made = History(steps=200)
    made.references = {"teacher": CLIPS, "data": CLIPS} if references is None else references
    for number, changed in enumerate([{}] * early + list(late), start=1):
        made.add(10 * number, HEALTHY | changed)
    return made


def alarms(made: History, **config: Any) -> dict[str, Finding]:
    return {finding.alarm: finding for finding in find(HealthConfig(**config), made)}


CASES: list[tuple[str, str, float, float]] = [
    # alarm, signal, a value that is wrong, the nearest to it that is not
    ("collapse", "variety", 0.119, 0.121),
    ("collapse", "latent_std", 0.49, 0.51),
    ("collapse", "teacher_distance/500", 0.61, 0.59),
    ("saturation", "latent_std", 1.51, 1.49),
    ("saturation", "latent_mean", -0.51, -0.49),
    ("saturation", "latent_mean", 0.51, 0.49),
    ("saturation", "contrast", 0.261, 0.259),
    ("saturation", "saturation", 0.49, 0.47),
    ("saturation", "clipped", 0.21, 0.19),
    ("motion", "motion", 0.0159, 0.0161),
    ("still_weights of critic.transformer", "moved/critic.transformer", 9e-6, 1.1e-5),
    ("gradients of student.transformer", "grad_norm/student.transformer", 5.1, 4.9),
    ("losses of critic", "critic_loss", 2.1, 1.9),
    ("losses of student", "student_loss", 0.81, 0.79),
    ("normaliser", "normaliser", 0.07, 0.08),
    ("normaliser", "normaliser", 1.3, 1.1),
    ("discriminator", "discriminator_accuracy", 0.51, 0.53),
    ("discriminator", "discriminator_accuracy", 0.99, 0.97),
]


def test_a_healthy_run_has_no_alarm():
    assert alarms(history()) == {}
    assert alarms(History(steps=200)) == {}


@pytest.mark.parametrize(("alarm", "signal", "wrong", "right"), CASES)
def test_a_number_beyond_its_threshold_raises_one_alarm(alarm, signal, wrong, right):
    found = alarms(history({signal: wrong}, {signal: wrong}))
    assert list(found) == [alarm]
    finding = found[alarm]
    assert finding.signal == signal
    assert finding.value == wrong
    assert min(wrong, right) <= finding.threshold <= max(wrong, right) or signal == "latent_mean"
    # A sentence with what is seen, a cause or a meaning, and what to do.
    assert ": " in finding.message
    assert "{" not in finding.message
    assert not finding.message.endswith(".")
    assert alarms(history({signal: right}, {signal: right})) == {}


@pytest.mark.parametrize(("alarm", "signal", "wrong", "right"), CASES)
def test_one_check_alone_is_no_alarm_unless_the_run_says_so(alarm, signal, wrong, right):
    assert alarms(history({signal: wrong})) == {}
    assert alarms(history({signal: wrong}, {})) == {}
    assert list(alarms(history({signal: wrong}), patience=1)) == [alarm]


def test_the_loss_that_adds_most_to_exploding_gradients_is_named():
    role = "student.transformer"
    parts = {f"loss_grad_norm/{role}/dmd_loss": 0.4, f"loss_grad_norm/{role}/gan_loss": 5.0}
    late = {f"grad_norm/{role}": 5.1} | parts
    assert "by gan_loss" in alarms(history(late, late))[f"gradients of {role}"].message
    del late[f"loss_grad_norm/{role}/gan_loss"]
    assert "by " not in alarms(history(late, late))[f"gradients of {role}"].message


@pytest.mark.parametrize("alarm", ["collapse", "saturation", "motion", "losses", "normaliser"])
def test_a_rule_that_is_off_says_nothing(alarm):
    signal, wrong = next((s, w) for a, s, w, _ in CASES if a.split(" ")[0] == alarm)
    made = history({signal: wrong}, {signal: wrong})
    assert alarms(made) != {}
    rule = attrs.evolve(getattr(HealthConfig(), alarm), action="off")
    assert alarms(made, **{alarm: rule}) == {}


def test_the_data_come_before_the_teacher_where_guidance_may_be_the_fault():
    burnt = CLIPS | {"latent_std": 1.8}
    made = history(
        {"latent_std": 1.8}, {"latent_std": 1.8}, references={"teacher": burnt, "data": CLIPS}
    )
    assert list(alarms(made)) == ["saturation"]
    # Captions alone: the teacher, as it samples with the student's guidance, is all there is.
    made = history({"latent_std": 1.8}, {"latent_std": 1.8}, references={"teacher": burnt})
    assert alarms(made) == {}


def test_data_without_motion_are_named_from_the_first_check_on():
    still = CLIPS | {"motion": 0.002}
    made = history(references={"teacher": CLIPS, "data": still}, early=1)
    finding = alarms(made)["motion of data"]
    assert finding.signal == "data/motion"
    assert "the data set hardly moves" in finding.message
    # Without a teacher their own contrast says whether they move.
    assert list(alarms(history(references={"data": still}, early=1))) == ["motion of data"]
    assert alarms(history(references={"data": CLIPS}, early=1)) == {}


def test_grey_data_say_nothing_about_colour():
    grey = CLIPS | {"saturation": 0.02}
    made = history(
        {"saturation": 0.2}, {"saturation": 0.2}, references={"teacher": grey, "data": grey}
    )
    assert alarms(made) == {}


def test_without_references_the_training_alone_is_watched():
    worst = {"variety": 0.0, "motion": 0.0, "latent_std": 99.0, "critic_loss": 9.0}
    assert list(alarms(history(worst, worst, references={}))) == ["losses of critic"]


@given(
    st.dictionaries(
        st.sampled_from(list(HEALTHY)), st.floats(allow_nan=True, width=32), max_size=4
    ),
    st.dictionaries(st.sampled_from(list(CLIPS)), st.floats(allow_nan=True, width=32)),
)
def test_no_number_breaks_a_rule(late, reference):
    made = history(late, late, references={"teacher": reference, "data": reference})
    for finding in find(HealthConfig(), made):
        assert not math.isnan(finding.value) or finding.message
