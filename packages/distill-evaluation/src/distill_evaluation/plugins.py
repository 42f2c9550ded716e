"""The plugin of the `report` callback. Imports no torch."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from distill_protocols import CallbackPlugin, DataError, PlannedRun, Problem, RunParts, below

from distill_evaluation.chosen import (
    chosen_metrics,
    measured_prompts,
    metric_problems,
    metrics_during,
)
from distill_evaluation.config import ReportConfig
from distill_evaluation.judge_files import judge_problem

if TYPE_CHECKING:
    from distill_protocols import Callback


class ReportPlugin(CallbackPlugin[ReportConfig]):
    name = "report"
    contract = 2
    help = "at the end or at intervals: metrics of samples, speed, contact sheet, clips"
    config_class: ClassVar[type] = ReportConfig

    def problems(self, config: ReportConfig, run: PlannedRun) -> Iterator[Problem]:
        judge = None if config.judge is None else judge_problem(Path(config.judge))
        if judge is not None:
            yield Problem("judge", judge)
        else:
            yield from metric_problems(config)
        try:
            measured_prompts(config)
        except DataError as error:
            yield Problem("prompts", str(error))
        if config.real_latents is not None and not Path(config.real_latents).is_file():
            yield Problem(
                "real_latents",
                f"there is no file {config.real_latents}; it holds `latents` of real clips. Copy "
                "some of the data set's, or leave it out",
            )
        if config.reference is not None and config.reference not in config.entries:
            yield Problem(
                "reference",
                f"{config.reference!r} must be one of the entries ({', '.join(config.entries)}), "
                "since the others' clips are compared with it",
            )
        if config.every_steps and not any(entry.during for entry in config.entries.values()):
            yield Problem(
                "every_steps",
                f"{config.every_steps}, but every entry states during: false, so there would be "
                "nothing to measure; leave one of them out, or use every_steps: 0",
            )
        for name, entry in config.entries.items():
            yield from below(run.role_problems(entry.role, ema=entry.ema), "entries", name)
            yield from below(run.sampler_problems(entry.sampler, entry.role), "entries", name)

    def metrics(self, config: ReportConfig) -> Mapping[str, int]:
        if config.judge is not None and judge_problem(Path(config.judge)) is not None:
            return {}  # `problems` reports what is wrong with the judge
        return dict.fromkeys(metrics_during(config, chosen_metrics(config)), config.every_steps)

    def build(self, config: ReportConfig, parts: RunParts) -> "Callback":
        from distill_evaluation.report import ReportCallback

        return ReportCallback(config, parts)


report = ReportPlugin()
