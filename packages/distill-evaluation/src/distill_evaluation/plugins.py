"""The `report` callback, as the app finds it. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from distill_protocols.plugins import CallbackPlugin, PlannedRun, RunParts

from distill_evaluation.config import ReportConfig

if TYPE_CHECKING:
    from distill_protocols.callbacks import Callback


class ReportPlugin(CallbackPlugin):
    name: ClassVar[str] = "report"
    help: ClassVar[str] = "at the end: Frechet distance, accuracies, speed, contact sheet, MP4"
    config_class: ClassVar[type] = ReportConfig

    def faults(self, config: ReportConfig, run: PlannedRun) -> Iterator[tuple[str, str]]:
        for name in ("judge.json", "judge.safetensors", "reference.safetensors"):
            if not (Path(config.judge) / name).is_file():
                yield (
                    "judge",
                    f"{config.judge} holds no {name}; a judge's folder holds judge.json, "
                    "judge.safetensors and reference.safetensors",
                )
        if not Path(config.prompts).is_file():
            yield "prompts", f"there is no file {config.prompts}; write one prompt a line"
        for name, entry in config.entries.items():
            for key, message in (
                *run.role_faults(entry.role, ema=entry.ema),
                *run.sampler_faults(entry.sampler),
            ):
                yield f"entries.{name}.{key}", message

    def build(self, config: ReportConfig, parts: RunParts) -> "Callback":
        from distill_evaluation.report import ReportCallback

        return ReportCallback(config, parts)


report = ReportPlugin()
