"""Callbacks and trackers."""

from __future__ import annotations

from collections.abc import Iterator

from distill_protocols import Problem, below
from distill_trainer import tracker_problems

from distill_runfile.draft import Draft


def check_callbacks(draft: Draft) -> Iterator[Problem]:
    """Yield what each callback has against the run, and trackers that cannot be had."""
    for name, callback in draft.callbacks.items():
        if callback.config is not None:
            problems = callback.plugin.problems(callback.config, draft.run)
            yield from below(problems, "callbacks", name)
    if draft.training is not None:
        yield from below(tracker_problems(draft.training.trackers), "training", "trackers")
