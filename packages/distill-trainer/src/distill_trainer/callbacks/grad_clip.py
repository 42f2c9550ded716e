"""Gradients clipped by their norm."""

from __future__ import annotations

from distill_protocols import Callback, RunState
from torch import Tensor

from distill_trainer.callbacks.configs import GradClipConfig
from distill_trainer.distribution.tensors import clip_gradients


class GradClipCallback(Callback):
    """Clips the gradients of each stepping optimizer separately, to one total L2 norm.

    Separately, because roles take different losses: the critic's large gradient must not
    shrink the student's. The norms are the trainer's own, ``grad_norm/<role.module>`` in
    ``run.metrics``, taken before any callback.
    """

    name = "grad_clip"

    def __init__(self, config: GradClipConfig) -> None:
        self.config = config

    def on_before_optimizer_step(self, run: RunState) -> None:
        if self.config.max_norm is None:
            return
        for key, optimizer in run.method.get_optimizers(run.iteration).items():
            norm = run.metrics.get(f"grad_norm/{key}")
            if isinstance(norm, Tensor):  # absent where nothing has a gradient
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                clip_gradients(parameters, self.config.max_norm, norm)
