"""The callbacks of this package as plugins, and their config classes. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from attrs import field, frozen
from attrs.validators import optional
from distill_protocols import CallbackPlugin, PlannedRun, Problem, RunParts
from distill_protocols.validators import above, at_least

if TYPE_CHECKING:
    from distill_protocols import Callback


@frozen(kw_only=True)
class EmaConfig:
    """Averages of weights, moved once an update of their module.

    Attributes:
        roles: trainable roles to average.
        decay: d in e <- d e + (1 - d) p.
        start_update: up to this update of a module its average only copies.
    """

    roles: tuple[str, ...] = field()
    decay: float = field(default=0.99)
    start_update: int = field(
        default=0, validator=at_least(0, "it counts updates; 0 averages from the first one on")
    )

    @roles.validator
    def _check_roles(self, attribute: object, value: tuple[str, ...]) -> None:
        if not value:
            raise ValueError("[] must name a role: nothing would be averaged. Leave ema out")

    @decay.validator
    def _check_decay(self, attribute: object, value: float) -> None:
        if not 0 <= value < 1:
            raise ValueError(
                f"{value:g} must lie in [0, 1): it is the share of the old average that is kept, "
                "and at 1 it would never move"
            )


@frozen(kw_only=True)
class GradClipConfig:
    """Gradient clipping, one norm an optimizer.

    Attributes:
        max_norm: the total L2 norm that gradients are scaled down to; null clips nothing.
    """

    max_norm: float | None = field(
        default=1.0,
        validator=optional(above(0, "gradients are scaled down to it. Set null to clip nothing")),
    )


@frozen(kw_only=True)
class StepTimerConfig:
    """Seconds an iteration and samples a second.

    Attributes:
        window: iterations that the mean goes over.
    """

    window: int = field(default=20, validator=at_least(1, "a mean needs an iteration"))


@frozen(kw_only=True)
class ProfilerConfig:
    """A torch.profiler trace into ``profile/``.

    Attributes:
        start: the first iteration traced; let some pass, as the first ones are not typical.
        steps: how many.
        shapes: record the shapes of operands too (slower, larger).
        all_ranks: a trace of every process, instead of the first one's.
    """

    start: int = field(default=10, validator=at_least(1, "iterations count from 1"))
    steps: int = field(
        default=3, validator=at_least(1, "a trace needs an iteration. Leave profiler out for none")
    )
    shapes: bool = False
    all_ranks: bool = False


@frozen(kw_only=True)
class ParamCountConfig:
    """A table of parameters by role and module. It has no keys."""


@frozen(kw_only=True)
class DebugDumpConfig:
    """Outputs and losses of a step on disk.

    Attributes:
        every_steps: iterations between two dumps; 0: none.
        on_exception: dump the last finished step when the run fails (keeps its outputs in
            memory for one iteration).
    """

    every_steps: int = field(
        default=0, validator=at_least(0, "it is an interval; 0 dumps only after an error")
    )
    on_exception: bool = True


class EmaPlugin(CallbackPlugin):
    name = "ema"
    contract = 2
    help = "keeps an exponential moving average of a role's weights"
    config_class = EmaConfig

    def averages(self, config: EmaConfig) -> tuple[str, ...]:
        return config.roles

    def problems(self, config: EmaConfig, run: PlannedRun) -> Iterator[Problem]:
        for name in config.roles:
            yield from (Problem("roles", p.message) for p in run.role_problems(name))
            if name in run.roles and not run.roles[name].trainable:
                yield Problem(
                    "roles", f"{name!r} is frozen: its weights never move, so leave it out"
                )

    def build(self, config: EmaConfig, parts: RunParts) -> Callback:
        from distill_trainer.callbacks.ema import EmaCallback

        return EmaCallback(config)


class GradClipPlugin(CallbackPlugin):
    name = "grad_clip"
    contract = 2
    help = "clips gradients, by one norm an optimizer"
    config_class = GradClipConfig

    def build(self, config: GradClipConfig, parts: RunParts) -> Callback:
        from distill_trainer.callbacks.grad_clip import GradClipCallback

        return GradClipCallback(config)


class StepTimerPlugin(CallbackPlugin):
    name = "step_timer"
    contract = 2
    help = "reports seconds an iteration and samples a second"
    config_class = StepTimerConfig

    def build(self, config: StepTimerConfig, parts: RunParts) -> Callback:
        from distill_trainer.callbacks.step_timer import StepTimerCallback

        return StepTimerCallback(config)


class ProfilerPlugin(CallbackPlugin):
    name = "profiler"
    contract = 2
    help = "writes a torch.profiler trace of a few iterations"
    config_class = ProfilerConfig

    def build(self, config: ProfilerConfig, parts: RunParts) -> Callback:
        from distill_trainer.callbacks.profiler import ProfilerCallback

        return ProfilerCallback(config)


class ParamCountPlugin(CallbackPlugin):
    name = "param_count"
    contract = 2
    help = "logs how many parameters each role has"
    config_class = ParamCountConfig

    def build(self, config: Any, parts: RunParts) -> Callback:
        from distill_trainer.callbacks.param_count import ParamCountCallback

        return ParamCountCallback()


class DebugDumpPlugin(CallbackPlugin):
    name = "debug_dump"
    contract = 2
    help = "writes a step's outputs and losses to disk, now and then or after an error"
    config_class = DebugDumpConfig

    def build(self, config: DebugDumpConfig, parts: RunParts) -> Callback:
        from distill_trainer.callbacks.debug_dump import DebugDumpCallback

        return DebugDumpCallback(config)


ema = EmaPlugin()
grad_clip = GradClipPlugin()
step_timer = StepTimerPlugin()
profiler = ProfilerPlugin()
param_count = ParamCountPlugin()
debug_dump = DebugDumpPlugin()
