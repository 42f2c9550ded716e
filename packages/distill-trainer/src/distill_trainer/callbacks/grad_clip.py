"""Gradient norms: reported, and clipped."""

from __future__ import annotations

from distill_protocols import Callback, RunState
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from distill_trainer.plugins import GradClipConfig


class GradClipCallback(Callback):
    """Clips the gradients of each stepping optimizer by themselves, to one total L2 norm.

    By themselves, because roles take different losses: the critic's large gradient must not
    shrink the student's. Reports ``grad_norm/<role.module>``, before clipping, on the device.
    """

    name = "grad_clip"

    def __init__(self, config: GradClipConfig) -> None:
        self.config = config

    def on_before_optimizer_step(self, run: RunState) -> None:
        for key, optimizer in run.method.get_optimizers(run.iteration).items():
            parameters = [
                p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
            ]
            if not parameters:
                continue
            # foreach=True: left to itself torch loops over parameters on a CPU.
            norm = get_total_norm([p.grad for p in parameters], foreach=True)  # type: ignore[misc]
            run.metrics[f"grad_norm/{key}"] = norm
            if self.config.max_norm is not None:
                clip_grads_with_norm_(parameters, self.config.max_norm, norm, foreach=True)
