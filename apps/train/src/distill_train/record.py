"""What a run leaves about itself in its output folder: its run file, and where it runs."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import torch
from attrs import define, field
from distill_runfile import RunConfig
from distill_runtime import UnreadableFileError, json_text, read_json_object, replace_file
from distill_trainer import Distribution

RECORD_FILE = "run_record.json"
"""Read by ``distill_evaluation.page``."""

_LIBRARIES = ("diffusers", "transformers", "peft", "numpy", "safetensors")
_MOST_STARTS = 1000


@define(eq=False, kw_only=True)
class RunRecord:
    """The record of a run, written by its first process at each start and end.

    Attributes:
        run_file: name and text of the run file as it was written; None: the run has no file.
        settings: every section as plain values, defaults included.
        environment: versions, processes and devices.
        starts: one for each process that worked on the run, the newest last: ``time`` (Unix
            seconds), and once it ended ``ended``, ``iteration`` and ``stop_reason``.
    """

    folder: Path
    run_file: Mapping[str, str] | None
    settings: Mapping[str, object]
    environment: Mapping[str, object]
    starts: list[dict[str, Any]] = field(factory=list)

    @classmethod
    def of_this_start(
        cls, config: RunConfig, run_file: Path | None, distribution: Distribution
    ) -> RunRecord:
        """Describe this start; earlier ones of the run in the same folder stay listed.

        Args:
            run_file: that ``config`` was read from.
        """
        folder = Path(config.training.output_dir)
        text = None
        if run_file is not None:
            text = {"name": run_file.name, "text": run_file.read_text("utf-8", "replace")}
        earlier = _earlier_starts(folder) if config.checkpoint.resume != "none" else []
        return cls(
            folder=folder,
            run_file=text,
            settings=config.resolved,
            environment=_environment(distribution),
            starts=[*earlier[-_MOST_STARTS:], {"time": time.time()}],
        )

    def write(self) -> None:
        """Write the file.

        Raises:
            OSError: it cannot be written.
        """
        content = {
            "run_file": self.run_file,
            "settings": self.settings,
            "environment": self.environment,
            "starts": self.starts,
        }
        with replace_file(self.folder / RECORD_FILE) as part:
            part.write_text(json_text(content), encoding="utf-8")

    def write_end(self, iteration: int, stop_reason: str | None) -> None:
        """Note how this start ended, and write the file."""
        end = {"ended": time.time(), "iteration": iteration, "stop_reason": stop_reason}
        self.starts[-1] |= end
        self.write()


def _earlier_starts(folder: Path) -> list[dict[str, Any]]:
    try:
        starts = read_json_object(folder / RECORD_FILE).get("starts")
    except UnreadableFileError:  # there is none, or it is damaged: it is written anew
        return []
    return (
        [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []
    )


def _environment(distribution: Distribution) -> dict[str, object]:
    ours = {d.name: d.version for d in distributions() if d.name.startswith("distill-")}
    device: dict[str, object] = {"type": distribution.device.type}
    if distribution.device.type == "cuda":
        properties = torch.cuda.get_device_properties(distribution.device)
        device |= {"name": properties.name, "memory_bytes": properties.total_memory}
        device["cuda"] = torch.version.cuda
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": platform.machine(),
        "processes": distribution.ranks.size,
        "strategy": distribution.strategy,
        "device": device,
        "packages": {
            "torch": str(torch.__version__),  # with its build, which the metadata lacks
            **_versions(_LIBRARIES),
            **dict(sorted(ours.items())),
        },
    }


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
