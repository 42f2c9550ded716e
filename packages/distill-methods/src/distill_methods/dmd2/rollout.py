"""Where the student's clean latents come from in DMD2. Letters: B batch, N sampler steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from distill_protocols import Condition, SamplerSpec
from torch import Tensor

from distill_methods.contracts import LatentDiffusion


def simulate(
    adapter: LatentDiffusion,
    spec: SamplerSpec,
    cond: Condition,
    *,
    exit_step: int,
    draw_noise: Callable[[int], Tensor],
    poll: Callable[[], None] = lambda: None,
) -> Tensor:
    """Backward simulation (DMD2, section 4.5): sample from noise, stop at ``exit_step``.

    The first ``exit_step`` calls are without gradient, the next one is with it, and it is the
    last: the calls that sampling would still make are never made (FastVideo makes them all and
    throws them away).

    Args:
        exit_step: k in 0..N-1; ranks that share a sharded student must use the same.
        draw_noise: ``draw_noise(0)`` is the initial noise [B, C, T, H, W], ``draw_noise(j)`` the
            fresh noise at step j; the latter is asked for only by a stochastic spec.
        poll: called before each model call; what it raises ends the rollout (``StopFlag.poll``).

    Returns:
        The student's x0 [B, C, T, H, W] at the noise level of step k, fp32.
    """
    sigmas = spec.sigmas()
    x_t = draw_noise(0)
    with torch.no_grad():
        for step in range(exit_step):
            poll()
            t = _level(x_t, sigmas[step])
            if spec.stochastic:
                x0 = adapter.forward("student", x_t, t, cond, fwd_pred_type="x0")
                x_t = adapter.add_noise(x0, draw_noise(step + 1), _level(x_t, sigmas[step + 1]))
            else:
                velocity = adapter.forward("student", x_t, t, cond, fwd_pred_type="v")
                x_t = x_t + (sigmas[step + 1] - sigmas[step]) * velocity
    poll()
    t = _level(x_t, sigmas[exit_step])
    return adapter.forward("student", x_t, t, cond, fwd_pred_type="x0")


def from_data(
    adapter: LatentDiffusion, cond: Condition, *, latents: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """The student's x0 from noised data: one call, each sample at a level of its own.

    Args:
        latents: normalised clean latents [B, C, T, H, W].
        noise: like ``latents``.
        t: one of the sampler's levels for each sample, fp32 [B].
    """
    x_t = adapter.add_noise(latents, noise, t)
    return adapter.forward("student", x_t, t, cond, fwd_pred_type="x0")


def _level(x_t: Tensor, sigma: float) -> Tensor:
    return torch.full((len(x_t),), 1000 * sigma, dtype=torch.float32, device=x_t.device)
