"""The plugin of the `health` callback. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from distill_protocols import CallbackPlugin, PlannedRun, Problem, RunParts

from distill_evaluation.health.config import HealthConfig

if TYPE_CHECKING:
    from distill_protocols import Callback


class HealthPlugin(CallbackPlugin[HealthConfig]):
    name = "health"
    contract = 2
    help = "watches for collapse, saturation, lost motion and other known failures, and warns"
    config_class: ClassVar[type] = HealthConfig
    on_by_default = True

    def problems(self, config: HealthConfig, run: PlannedRun) -> Iterator[Problem]:
        if (
            config.role != HealthConfig().role
        ):  # the default watches nothing where there is no student
            for problem in run.role_problems(config.role):
                yield Problem("role", problem.message)
            if config.role in run.roles and run.roles[config.role].heads is not None:
                yield Problem(
                    "role",
                    f"{config.role!r} is a discriminator, which makes no clips. Name another role",
                )
        if config.teacher_sampler is not None:
            for problem in run.sampler_problems(config.teacher_sampler):
                yield Problem("teacher_sampler", problem.message)

    def build(self, config: HealthConfig, parts: RunParts) -> Callback:
        from distill_evaluation.health.callback import HealthCallback

        return HealthCallback(config, parts)


health = HealthPlugin()
