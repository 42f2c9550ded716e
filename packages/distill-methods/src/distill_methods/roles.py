"""Roles that several methods call. No torch here: run files are checked without it."""

from __future__ import annotations

from distill_protocols import RoleNeed

STUDENT = RoleNeed(name="student", trainable=True, help="the model that learns")
TEACHER = RoleNeed(name="teacher", trainable=False, help="the fixed model that is copied")
CRITIC = RoleNeed(
    name="critic",
    trainable=True,
    help="follows the distribution of the student's own clips (DMD's fake score)",
    reason=(
        "the student learns from the difference of two scores, and the score of its own clips is "
        "in no teacher and in no data, so a second model must learn it. Without a critic, choose "
        "teacher_only, kd, consistency or ladd as the method"
    ),
)
DISCRIMINATOR = "discriminator"


def discriminator(*on: str) -> RoleNeed:
    """Return the need for a discriminator: heads on features of one of the roles ``on``."""
    return RoleNeed(
        name=DISCRIMINATOR,
        trainable=True,
        help="heads that distinguish the student's clips from the data's",
        features_of=on,
    )


def roles_apart(roles: tuple[str, ...], student: str) -> tuple[tuple[str, ...], ...]:
    """Divide the roles of an iteration into those beside ``student`` and the student itself: the
    order in which their losses are differentiated (``MethodConfig.turns_apart``)."""
    beside = tuple(name for name in roles if name != student)
    own = tuple(name for name in roles if name == student)
    return tuple(group for group in (beside, own) if group)
