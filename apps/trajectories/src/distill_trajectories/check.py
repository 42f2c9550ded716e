"""From a file to a checked request, or to every problem of the file at once. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from distill_train.check import read_sampled
from distill_train.schema import SampledConfig
from distill_train.source import Path_

from distill_trajectories.config import TrajectoriesConfig

SECTION = "trajectories"


def read_request(file: Path, *, planning: bool = False) -> SampledConfig:
    """Read and check ``file``; its ``section`` is a ``TrajectoriesConfig``.

    Args:
        planning: nothing will be made, so a data folder that is not there yet is no problem.

    Raises:
        ConfigError: with every problem that was found, each ``file:line: key: message``.
    """
    return read_sampled(file, SECTION, TrajectoriesConfig, _rules, planning=planning)


def _rules(config: SampledConfig) -> Iterator[tuple[Path_, str]]:
    own: TrajectoriesConfig = config.section
    if own.output_dir == config.data.path:
        yield (
            (SECTION, "output_dir"),
            f"{own.output_dir} is the data set that the captions come from; the clips are another "
            "one. Name a folder of its own",
        )
    if Path(own.output_dir).is_file():
        yield (
            (SECTION, "output_dir"),
            f"{own.output_dir} is a file; clips become many, in a folder of their own",
        )
    name = config.role.spec.name
    if name in config.family_plugin.capabilities(config.pipeline).causal_roles:
        yield (
            ("pipeline_config", "causal", "roles"),
            f"{name!r} is causal and samples chunk by chunk, so no state on its way is one of a "
            "whole clip. Take it out; the student of these trajectories may be causal",
        )
