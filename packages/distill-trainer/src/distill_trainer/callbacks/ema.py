"""Averages of a role's weights, moved whenever its optimizer moved."""

from __future__ import annotations

from distill_protocols import Callback, RoleError, RunState, StepRecord

from distill_trainer.ema import ExponentialMovingAverage
from distill_trainer.plugins import EmaConfig


class EmaCallback(Callback):
    """Hangs an average on every module of the named roles (``RoleHandle.ema``).

    An average moves exactly when that module's own optimizer has stepped: not in iterations that
    are another role's turn, and not where fp16 scaling left the step out. Its state is saved with
    the role, not here.
    """

    name = "ema"

    def __init__(self, config: EmaConfig) -> None:
        self.config = config

    def on_train_start(self, run: RunState) -> None:
        run.method.bundle.require_roles(self.config.roles)
        for name in self.config.roles:
            role = run.method.bundle[name]
            if not role.trainable:
                raise RoleError(
                    f"callbacks.ema.roles names {name!r}, which is frozen (trainable: false); its "
                    "weights never move, so there is nothing to average. Leave it out."
                )
            for key, module in role.modules.items():
                role.ema[key] = ExponentialMovingAverage(
                    module,
                    self.config.decay,
                    start_update=self.config.start_update,
                    names=None if role.trained is None else role.trained[key],
                )

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        if not step.stepped:
            return
        averages = run.method.bundle.by_module("ema")
        modules = run.method.model_dict
        for key in step.stepped:
            if key in averages:
                averages[key].update(modules[key])
