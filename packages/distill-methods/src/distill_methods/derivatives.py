"""The derivative of a role's prediction along a direction, by the difference of two calls.

Forward mode (``Tangents.forward_jvp``) is exact, and needs a rule of every layer and plain
attention. A difference needs calls as all others are made.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distill_methods.time_sampling import MAX_T


@torch.no_grad()
def finite_difference(
    call: Callable[[Tensor, Tensor], Tensor],
    x_t: Tensor,
    t: Tensor,
    velocity: Tensor,
    step: float,
) -> Tensor:
    """Return ``d/ds call(x, t)`` along ``dx/ds = velocity``, like ``x_t``, without gradient.

    ``(call(x_t + h v, t + 1000 h) - call(x_t - h v, t - 1000 h)) / 2h`` with h = step / 1000, off
    by h^2 / 6 of the third derivative. Where one of the two times would leave [0, 1000], it is the
    end of that range, and the difference that of the shorter interval, off by h / 2 of the second.

    Args:
        call: gives a prediction at (x, t), fp32 or wider.
        x_t: [B, C, T, H, W].
        t: [B], in [0, 1000].
        velocity: like ``x_t``, for s = t / 1000.
        step: in units of t.
    """
    above, below = (t + step).clamp(max=MAX_T), (t - step).clamp(min=0)

    def call_at(time: Tensor) -> Tensor:
        return call(x_t + _per_sample((time - t) / MAX_T) * velocity, time)

    # The widths are those of the times as they are after rounding, so that they do not err by it.
    return (call_at(above) - call_at(below)) / _per_sample((above - below) / MAX_T)


def _per_sample(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1, 1)
