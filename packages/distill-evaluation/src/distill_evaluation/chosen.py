"""Which metrics a report measures. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen
from distill_protocols import (
    DataError,
    MetricInput,
    MetricInputs,
    MetricNumber,
    MetricPlugin,
    Problem,
    below,
)
from distill_runtime import load_plugin

from distill_evaluation.config import ReportConfig, metric_name
from distill_evaluation.labels import read_prompts

BY_DEFAULT = (
    "frechet", "distances", "attributes", "diversity", "motion", "pictures", "likeness",
)  # fmt: skip
"""Measured where a report names no metrics, as far as it has what they need."""

_NEEDED: Mapping[MetricInput, str] = {
    "judge": "a judge's folder (judge)",
    "real_latents": "latents of real clips (real_latents)",
    "reference": "an entry to compare the others with (reference)",
}


@frozen(kw_only=True)
class ChosenMetric:
    """A metric that a report measures, with its options."""

    name: str
    plugin: MetricPlugin[Any]
    config: Any

    def missing(self, inputs: MetricInputs) -> list[MetricInput]:
        """Return what it needs and the report does not have."""
        return [need for need in self.plugin.needs(self.config) if not inputs.has(need)]

    def numbers(self, inputs: MetricInputs) -> Mapping[str, MetricNumber]:
        """Return its numbers by name."""
        return self.plugin.numbers(self.config, inputs)


def chosen_metrics(config: ReportConfig) -> tuple[ChosenMetric, ...]:
    """Return the metrics of a report in the order of its columns.

    Raises:
        PluginError: one of them is not installed, or broken.
    """
    if config.metrics is not None:
        return tuple(
            ChosenMetric(name=name, plugin=load_plugin("distill.metrics", name), config=options)
            for name, options in config.metrics.items()
        )
    inputs = inputs_of(config)
    plugins = [(name, load_plugin("distill.metrics", name)) for name in BY_DEFAULT]
    metrics = [ChosenMetric(name=n, plugin=p, config=p.config_class()) for n, p in plugins]
    return tuple(metric for metric in metrics if not metric.missing(inputs))


def inputs_of(config: ReportConfig, prompts: tuple[str, ...] | None = None) -> MetricInputs:
    """Return what the report has for its metrics to read.

    Args:
        prompts: that are read already; None: they are read here, and none where they cannot be.
    """
    if prompts is None:
        try:
            prompts = tuple(measured_prompts(config))
        except DataError:  # `problems` reports it
            prompts = ()
    return MetricInputs(
        prompts=prompts,
        clips_per_prompt=config.clips_per_prompt,
        fps=config.fps,
        judge=None if config.judge is None else Path(config.judge),
        real_latents=None if config.real_latents is None else Path(config.real_latents),
        reference=config.reference,
    )


def measured_prompts(config: ReportConfig) -> list[str]:
    """Read the prompts whose clips are measured. DataError if their file cannot be read."""
    if config.prompts is None:
        return list(config.sheet_prompts)
    return read_prompts(Path(config.prompts))


def numbers_of_entry(
    config: ReportConfig, metrics: tuple[ChosenMetric, ...], entry: str
) -> dict[str, MetricNumber]:
    """Return the numbers of one entry, by name: all but those that compare the reference with
    itself."""
    inputs = inputs_of(config, prompts=())
    return {
        name: number
        for metric in metrics
        if measures_entry(metric, config, entry)
        for name, number in metric.numbers(inputs).items()
    }


def measures_entry(metric: ChosenMetric, config: ReportConfig, entry: str) -> bool:
    """Tell whether ``metric`` is measured of ``entry``."""
    return entry != config.reference or "reference" not in metric.plugin.needs(metric.config)


def metrics_during(config: ReportConfig, metrics: tuple[ChosenMetric, ...]) -> tuple[str, ...]:
    """List the names of what is measured during the run."""
    if not config.every_steps:
        return ()
    return tuple(
        metric_name(name, number)
        for name, entry in config.entries.items()
        if entry.during
        for number in numbers_of_entry(config, metrics, name)
    )


def metric_problems(config: ReportConfig) -> Iterator[Problem]:
    """Yield what is wrong with the metrics of a report; paths are its keys."""
    inputs, metrics = inputs_of(config), chosen_metrics(config)
    owners: dict[str, str] = {}
    for metric in metrics:
        missing = metric.missing(inputs)
        if missing:
            needed = " and ".join(_NEEDED[need] for need in missing)
            yield Problem(
                ("metrics", metric.name),
                f"it needs {needed}, and this report has none. Give it, or leave the metric out",
            )
            continue
        yield from below(metric.plugin.problems(metric.config, inputs), "metrics", metric.name)
        for problem in metric.plugin.input_problems(metric.config, inputs):
            if problem.path == ("prompts",) and config.prompts is None:
                problem = Problem("sheet_prompts", problem.message)
            yield problem
        for number in metric.numbers(inputs):
            if number in owners:
                yield Problem(
                    ("metrics", metric.name),
                    f"its number {number!r} is also one of {owners[number]}, and an entry has one "
                    "of each name. Measure one of the two, or rename what names it",
                )
            owners.setdefault(number, metric.name)
