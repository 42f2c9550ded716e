"""From a file to a checked request, or to every problem of the file at once. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from distill_protocols import Problem
from distill_runfile import SampledConfig, read_sampled

from distill_trajectories.config import TrajectoriesConfig

SECTION = "trajectories"


def read_request(file: Path, *, planning: bool = False) -> SampledConfig[TrajectoriesConfig]:
    """Read and check ``file``.

    Args:
        planning: nothing will be made, so a data folder that is not there yet is no problem.

    Raises:
        ConfigError: with every problem that was found, each ``file:line: key: message``.
    """
    return read_sampled(file, SECTION, TrajectoriesConfig, _problems, planning=planning)


def _problems(config: SampledConfig[TrajectoriesConfig]) -> Iterator[Problem]:
    output_dir = config.section.output_dir
    if output_dir in [one.path for one in config.data.all_sets]:
        yield Problem(
            (SECTION, "output_dir"),
            f"{output_dir} is the data set that the captions come from; the clips are another "
            "one. Name a folder of its own",
        )
    if Path(output_dir).is_file():
        yield Problem(
            (SECTION, "output_dir"),
            f"{output_dir} is a file; clips become many, in a folder of their own",
        )
    name = config.role.spec.name
    if name in config.family_plugin.capabilities(config.pipeline).causal_roles:
        yield Problem(
            ("pipeline_config", "causal", "roles"),
            f"{name!r} is causal and samples chunk by chunk, so no state of its trajectory is one "
            "of a whole clip. Take it out; the student of these trajectories may be causal",
        )
