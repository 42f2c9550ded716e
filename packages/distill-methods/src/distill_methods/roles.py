"""Roles that several methods call. No torch here."""

from __future__ import annotations

from distill_protocols import RoleNeed

STUDENT = RoleNeed(name="student", trainable=True, help="the model that learns")
TEACHER = RoleNeed(name="teacher", trainable=False, help="the fixed model that is copied")
CRITIC = RoleNeed(
    name="critic",
    trainable=True,
    help="follows the student's own clips",
    reason=(
        "the student is led by the difference of two scores, and that of its own clips is in no "
        "teacher and no data, so a model must follow it. Without a critic take another "
        "recipe.method: teacher_only, kd, consistency or ladd"
    ),
)
DISCRIMINATOR = "discriminator"


def discriminator(*on: str) -> RoleNeed:
    """Heads on features of one of ``on``."""
    return RoleNeed(
        name=DISCRIMINATOR,
        trainable=True,
        help="heads that tell the student's clips from the data's",
        features_of=on,
    )
