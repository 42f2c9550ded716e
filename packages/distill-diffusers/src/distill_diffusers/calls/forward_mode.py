"""Forward-mode differentiation of a model call: what it gives, and how that changes, at once.

No fused attention has a forward-mode rule (torch 2.15: neither flash nor memory-efficient, on the
CPU as on GPUs); the plain one has, and makes all scores, [B, heads, L, L]. So it is called on some
queries at a time: as nothing is kept for a backward pass, that many rows of scores are all that is
ever there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_SCORES = 2**26
"""Attention scores at once: 256 MB in fp32, of which there are a handful."""


def derivative(
    call: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, dx: Tensor, dt: Tensor
) -> tuple[Tensor, Tensor]:
    """``call(x, t)``, and ``d/dh call(x + h dx, t + h dt)`` at h = 0; both without gradient."""
    # Compiled blocks run as they are written: a graph knows nothing of tangents.
    with torch.no_grad(), _eager(), forward_ad.dual_level(), _PlainAttention():
        out = call(forward_ad.make_dual(x, dx.to(x)), forward_ad.make_dual(t, dt.to(t)))
        value, tangent = forward_ad.unpack_dual(out)
        return value, torch.zeros_like(value) if tangent is None else tangent


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


class _PlainAttention(TorchFunctionMode):
    """Within: ``scaled_dot_product_attention`` without a fused kernel, by parts of the queries."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """Of [B, heads, L, D]."""
    assert not options.get("is_causal")  # would need its place in the whole; Wan has masks instead
    rows = max(1, _SCORES // (query.shape[0] * query.shape[1] * key.shape[-2]))
    parts = []
    with sdpa_kernel(SDPBackend.MATH):
        for i in range(0, query.shape[-2], rows):
            mask = attn_mask
            if mask is not None and mask.shape[-2] > 1:
                mask = mask[..., i : i + rows, :]
            part = query[..., i : i + rows, :]
            parts.append(F.scaled_dot_product_attention(part, key, value, mask, **options))
    return torch.cat(parts, dim=-2)
