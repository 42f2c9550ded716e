"""Roles that are sampled, in validation and by apps that do nothing else."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import evolve
from distill_protocols import Problem, below

from distill_runfile.draft import Draft


def check_validation(draft: Draft) -> Iterator[Problem]:
    """Whether the role of each view can be sampled with the view's settings."""
    if draft.validation is None:
        return
    # A first frame for each prompt is what image-to-video models lack otherwise.
    run = evolve(draft.run, pictured=frozenset()) if draft.validation.images else draft.run
    for name, view in draft.validation.views.items():
        problems = (
            *run.role_problems(view.role, ema=view.ema),
            *run.sampler_problems(view.sampler, view.role),
        )
        yield from below(problems, "validation", "views", name)


def check_sampled(draft: Draft) -> Iterator[Problem]:
    """Whether the one role of a file that trains nothing can be sampled."""
    for name, config in draft.role_configs.items():
        if config.trainable:
            yield Problem(
                ("models", name, "trainable"),
                "true, but nothing is trained here: the role is sampled. Leave the key out",
            )
    if len(draft.written_roles) != 1 and draft.document.values.get("models") is not None:
        names = ", ".join(sorted(draft.written_roles)) or "none"
        yield Problem(
            ("models",),
            f"{names}: one role is sampled, and another would only cost memory. Name just one, "
            "the teacher",
        )
    if draft.sampled is None:
        return
    section, config = draft.sampled
    # The data set brings the pictures that a model cannot be called without.
    run = evolve(draft.run, pictured=frozenset())
    for name in draft.roles:
        yield from below(run.sampler_problems(config.sampler, name), section)
