"""Where numbers, texts and clips are logged. Trackers are plugins of ``distill.trackers``.

No torch here: run files are checked by ``tracker_problems``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distill_protocols import ConfigError, PluginError, Problem, TrackerPlugin
from distill_runtime import load_plugin

if TYPE_CHECKING:
    from distill_protocols import Tracker


def build_trackers(names: Sequence[str], output_dir: str | Path) -> tuple[Tracker, ...]:
    """Build the trackers called ``names``, which write into ``output_dir``.

    Raises:
        ConfigError: one of them cannot be had (``tracker_problems``).
    """
    if problems := [problem.message for problem in tracker_problems(names)]:
        raise ConfigError(problems)
    plugins: list[TrackerPlugin] = [load_plugin("distill.trackers", name) for name in names]
    return tuple(plugin.build(Path(output_dir)) for plugin in plugins)


def tracker_problems(names: Sequence[str]) -> Iterator[Problem]:
    """Yield what is wrong with a run's trackers: names that nobody offers, or offered twice in the
    list, and packages that a tracker needs and that are not installed. Paths are empty."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        yield Problem("", f"{', '.join(twice)} is named twice: one run logs to it once")
    for name in dict.fromkeys(names):
        try:
            plugin: TrackerPlugin = load_plugin("distill.trackers", name)
        except PluginError as error:
            yield Problem("", str(error))
        else:
            yield from plugin.problems()
