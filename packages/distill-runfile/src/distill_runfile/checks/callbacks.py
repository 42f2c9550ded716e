"""Callbacks and trackers."""

from __future__ import annotations

from collections.abc import Iterator

from distill_protocols import PluginError, Problem, below
from distill_runtime import load_plugin, plugin_names

from distill_runfile.draft import Draft


def check_callbacks(draft: Draft) -> Iterator[Problem]:
    """Rules of each callback over the run, and trackers that are not installed."""
    for name, callback in draft.callbacks.items():
        if callback.config is not None:
            problems = callback.plugin.problems(callback.config, draft.run)
            yield from below(problems, "callbacks", name)
    # Without any plugin there are the trainer's own trackers, whose names its section checks.
    if draft.training is None or not plugin_names("distill.trackers"):
        return
    for i, name in enumerate(draft.training.trackers):
        try:
            load_plugin("distill.trackers", name)
        except PluginError as error:
            yield Problem(("training", "trackers", str(i)), str(error))
