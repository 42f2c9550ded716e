"""Forward-mode differentiation of a model call: its value and its derivative in one pass.

No fused attention has a forward-mode rule (torch 2.15: neither flash nor memory-efficient, on the
CPU as on GPUs). The plain kernel has one, and computes all scores, [B, heads, L, L]. So it is
called on some queries at a time: as nothing is kept for a backward pass, the scores of those
queries are all that is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_MAX_SCORES = 2**26
"""Attention scores computed at once: 256 MB in fp32, and a handful of such tensors."""


def derivative(
    call: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, dx: Tensor, dt: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``call(x, t)`` and ``d/dh call(x + h dx, t + h dt)`` at h = 0, without gradient."""
    # Compiled blocks run eagerly: a compiled graph drops tangents.
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        forward_ad.dual_level(),
        _PlainAttention(),
    ):
        out = call(forward_ad.make_dual(x, dx.to(x)), forward_ad.make_dual(t, dt.to(t)))
        value, tangent = forward_ad.unpack_dual(out)
        return value, torch.zeros_like(value) if tangent is None else tangent


class _PlainAttention(TorchFunctionMode):
    """Compute ``scaled_dot_product_attention`` without a fused kernel, some queries at a time."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """Attend in parts of the queries, all [B, heads, L, D]: each row of the softmax is one query's,
    so that the parts are independent and their outputs only need to be joined."""
    # is_causal counts rows from the first of a call, which would be wrong in all parts but one.
    assert not options.get("is_causal")
    rows = max(1, _MAX_SCORES // (query.shape[0] * query.shape[1] * key.shape[-2]))
    parts = []
    with sdpa_kernel(SDPBackend.MATH):
        for i in range(0, query.shape[-2], rows):
            mask = attn_mask
            if mask is not None and mask.shape[-2] > 1:
                mask = mask[..., i : i + rows, :]
            part = query[..., i : i + rows, :]
            parts.append(F.scaled_dot_product_attention(part, key, value, mask, **options))
    return torch.cat(parts, dim=-2)
