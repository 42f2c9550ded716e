"""The loss of average velocities of one micro batch: a part that methods put together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from distill_protocols import Batch, Condition, one_tensor
from torch import Tensor

from distill_methods.context import MethodContext
from distill_methods.contracts import loss_mask_of, require_contract
from distill_methods.derivatives import finite_difference
from distill_methods.flow_map.config import FlowMap
from distill_methods.maths import flow_map_loss, flow_map_target
from distill_methods.teachers.ensemble import Teachers


class FlowMapResult(NamedTuple):
    """A loss, and detached metrics for logs."""

    loss: Tensor
    outputs: dict[str, Tensor]


class FlowMapLoss:
    """The student predicts the average velocity between two times (MeanFlow, Geng et al. 2025,
    arXiv:2505.13447, eq. 6 and 9; AnyFlow, arXiv:2605.13724)::

        u(x_t, t, r) = 1/(s - s_r) int_{s_r}^{s} v(x_a, a) da       so that x_r = x_t - (s - s_r) u
        u            = v(x_t, t) - (s - s_r) du/ds                   differentiated by s
        L            = mean w |u(x_t, t, r) - stop(v - (s - s_r) du/ds)|^2

    du/ds along ``dx/ds = v`` is a central difference of the student's own u, without gradient. At
    r = t it is flow matching.

    v is the guided teachers', or of data ``w (eps - x0) + (1 - w) u(x_t, t, t, negative)``
    (MeanFlow, eq. 19): guidance of the student by itself. w of the loss is
    ``15/4 s sqrt(1 - s) / (d + c)^p``, d a sample's error (AnyFlow's weight; MeanFlow, eq. 22).

    Args:
        teachers: needed of ``velocity: teacher``.

    Raises:
        CapabilityError: the adapter has no flow maps.
    """

    def __init__(
        self, context: MethodContext, config: FlowMap, *, teachers: Teachers | None
    ) -> None:
        self._context = context
        self._config = config
        self._maps = require_contract(
            context.adapter.flow_maps, "supports_flow_maps", by=context.name
        )
        self._teachers = teachers

    def __call__(self, batch: Batch, iteration: int) -> FlowMapResult:
        """``outputs``: ``flow_map_error``, the mean square of the error without weights, and
        ``derivative_rms``, that of (s - s_r) du/ds."""
        context, config = self._context, self._config
        x0 = context.adapter.normalize_latents(one_tensor(batch.clean_latents))
        t, target_t = self._sample_times(len(batch), iteration)
        noise = context.noise.noise_like(x0, f"{context.name}.noise")
        x_t = context.adapter.add_noise(x0, noise, t)
        average = self._maps.forward_to("student", x_t, t, target_t, batch.cond)
        loss_mask = loss_mask_of(context.adapter, batch)
        with torch.no_grad():
            velocity = self._velocity(x_t, t, batch.cond, noise - x0)
            derivative = finite_difference(
                lambda x, time: self._maps.forward_to("student", x, time, target_t, batch.cond),
                x_t,
                t,
                velocity,
                config.difference,
            )
            target = flow_map_target(velocity, derivative, t, target_t)
            outputs = {
                "flow_map_error": (average - target).square().mean(),
                "derivative_rms": (target - velocity).square().mean().sqrt(),
            }
        loss = flow_map_loss(
            average, target, t, config.adaptive_power, config.adaptive_c, loss_mask
        )
        return FlowMapResult(loss, outputs)

    def _sample_times(self, rows: int, iteration: int) -> tuple[Tensor, Tensor]:
        """Draw t and r of each sample, [B]."""
        context, config = self._context, self._config
        first, second = (
            context.noise.sample_timesteps(
                f"{context.name}.{name}", rows, iteration, config.time, "student"
            )
            for name in ("t", "target_t")
        )
        t, target_t = torch.maximum(first, second), torch.minimum(first, second)
        u = context.noise.streams.rows(f"{context.name}.interval", rows).uniform()
        to_data = u < config.same_time_share + config.to_data_share
        target_t = torch.where(to_data, torch.zeros_like(target_t), target_t)
        target_t = torch.where(u < config.same_time_share, t, target_t)
        return t.to(context.device), target_t.to(context.device)

    def _velocity(self, x_t: Tensor, t: Tensor, cond: Condition, of_data: Tensor) -> Tensor:
        """Return the guided velocity whose average the student learns."""
        if self._config.velocity == "teacher":
            assert self._teachers is not None
            return self._teachers.predict(x_t, t, cond)
        w = self._config.guidance_scale
        if w == 1:
            return of_data
        negative = self._context.adapter.forward(
            "student",
            x_t,
            t,
            cond,
            fwd_pred_type="v",
            neg_cond=self._context.draw_negative(len(x_t)),
            cfg=0.0,
        )
        return w * of_data + (1 - w) * negative
