"""Roles that several methods call. No torch here."""

from __future__ import annotations

from distill_protocols.plugins import RoleNeed

STUDENT = RoleNeed(name="student", trainable=True, help="the model that learns")
TEACHER = RoleNeed(name="teacher", trainable=False, help="the fixed model that is copied")
CRITIC = RoleNeed(name="critic", trainable=True, help="follows the student's own clips")
