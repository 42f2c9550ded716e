"""The attention kernel of one role, by diffusers' names.

diffusers has a registry of kernels and a function that sets one for a model
(``ModelMixin.set_attention_backend``). That function also makes it the kernel of every other model
that has none of its own, which is put back here: a role's option is that role's alone.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from distill_protocols import DTYPES, CapabilityError, Precision

from distill_diffusers.kinds import ModelKind, class_name

TAKE_A_BIAS = frozenset(
    (
        AttentionBackendName.NATIVE,
        AttentionBackendName._NATIVE_CUDNN,
        AttentionBackendName._NATIVE_EFFICIENT,
        AttentionBackendName._NATIVE_MATH,
        AttentionBackendName.FLEX,
        AttentionBackendName.XFORMERS,
    )
)
"""Kernels that add a bias to the scores. Of the others flash and sage raise an error in the first
call, their varlen forms take masks of booleans alone, and the one of NPUs makes such a mask of a
bias, in which attended and hidden have changed places."""


def available_backends(kind: ModelKind) -> tuple[str, ...]:
    """Return names of the kernels for ``kind`` that run with the packages that are installed.

    Some of them need a GPU, which the machine that checks a run may not have: that is not asked.
    """
    return tuple(
        backend.value
        for backend in AttentionBackendName
        if _can_add_what_it_must(kind, backend) and _missing_part(backend) is None
    )


def backend_problem(kind: ModelKind, name: str) -> str | None:
    """Say why there is no kernel ``name`` for ``kind``, or what it needs; None where it can be
    set."""
    try:
        backend = AttentionBackendName(name)
    except ValueError:
        names = ", ".join(available_backends(kind))
        return f"diffusers knows no attention backend {name!r}; here it can be {names}"
    if not _can_add_what_it_must(kind, backend):
        return (
            f"attention backend {name!r} cannot add a bias to the scores, and "
            f"{class_name(kind.transformer)} hides the padding of a text by one. Use one of "
            f"{', '.join(available_backends(kind))}, or leave it out for torch's own choice"
        )
    missing = _missing_part(backend)
    return None if missing is None else f"attention backend {name!r} {missing}"


def _can_add_what_it_must(kind: ModelKind, backend: AttentionBackendName) -> bool:
    return not kind.attention_bias or backend in TAKE_A_BIAS


def _missing_part(backend: AttentionBackendName) -> str | None:
    """Say what this machine lacks for a kernel; None where it has all."""
    try:
        attention_dispatch._check_attention_backend_requirements(backend)
    except RuntimeError as error:
        return f"cannot run here: {error}"
    # diffusers checks these two only where it calls them.
    needs = {
        AttentionBackendName.XFORMERS: (attention_dispatch._CAN_USE_XFORMERS_ATTN, "xformers"),
        AttentionBackendName._NATIVE_XLA: (attention_dispatch._CAN_USE_XLA_ATTN, "torch_xla"),
    }
    is_there, package = needs.get(backend, (True, ""))
    return None if is_there else f"needs {package}; install it"


def set_backend(module: ModelMixin, name: str) -> None:
    """Let all attention layers of ``module``, and of no other model, use the kernel ``name``."""
    registry = attention_dispatch._AttentionBackendRegistry
    active, _ = registry.get_active_backend()
    try:
        module.set_attention_backend(name)
    finally:
        registry.set_active_backend(active)


def head_width(module: ModelMixin) -> int:
    """Return the channels of a head of the first attention layer of ``module``."""
    for part in module.modules():
        if isinstance(part, (Attention, AttentionModuleMixin)):
            layer = cast(Any, part)
            return layer.to_q.out_features // layer.heads
    raise CapabilityError(
        f"{type(module).__name__} has no attention layer whose kernel diffusers could set. Leave "
        "attention_backend out."
    )


def check_backend(
    name: str, device: torch.device, precision: Precision, *, head_width: int, trainable: bool
) -> None:
    """Call the kernel ``name`` once as a role would, on few tokens.

    diffusers knows which packages a kernel needs, but not on which devices and in which precisions
    it runs, so that a run would otherwise fail in its first step.

    Args:
        head_width: channels of an attention head.
        trainable: whether the role is differentiated.

    Raises:
        CapabilityError: the call, or its backward pass, fails.
    """
    tokens = torch.zeros(
        (1, 128, 1, head_width), dtype=DTYPES[precision], device=device, requires_grad=trainable
    )
    try:
        out = dispatch_attention_fn(tokens, tokens, tokens, backend=AttentionBackendName(name))
        if trainable:
            out.sum().backward()
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CapabilityError(
            f"attention backend {name!r} does not run on {device.type} in {precision} with heads "
            f"of {head_width} channels{', or not backwards' if trainable else ''}: {reason} Name "
            "another, or leave it out for torch's own choice."
        ) from error
