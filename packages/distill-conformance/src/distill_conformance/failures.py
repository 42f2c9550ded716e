"""How a check fails: with the observation and the rule that it breaks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from distill_protocols import ContractError
from torch import Tensor

REFUSALS = (ContractError,)
"""What may be raised for an input that does not fit, or for what an adapter does not state that it
can do: an error of whoever checked it, and none from inside of torch or of a model library."""


class ConformanceError(AssertionError):
    """A plugin breaks a rule of the contract."""


class NotApplicable(Exception):
    """A check asks for something that this plugin does not claim; the suites skip it."""


def require(condition: bool, message: str) -> None:
    """Raise ``ConformanceError`` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConformanceError(message)


def applies_if(condition: bool, reason: str) -> None:
    """Raise ``NotApplicable`` with ``reason`` unless ``condition`` holds."""
    if not condition:
        raise NotApplicable(reason)


def require_equal(actual: Tensor, expected: Tensor, rule: str) -> None:
    """Require the same shape, dtype and bits."""
    require_shape(actual, tuple(expected.shape), rule)
    if not torch.equal(actual, expected):
        difference = (actual.double() - expected.double()).abs().max()
        raise ConformanceError(
            f"{rule}: equal to the last bit, but they differ by up to {difference:g}"
        )


def require_close(
    actual: Tensor, expected: Tensor, rule: str, *, rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """Require ``|actual - expected| <= atol + rtol max |expected|`` everywhere.

    The bound is relative to the largest value, because single values near 0 are differences of
    large ones.
    """
    require_shape(actual, tuple(expected.shape), rule)
    difference = (actual.double() - expected.double()).abs()
    bound = atol + rtol * float(expected.double().abs().max()) if expected.numel() else atol
    # `not <=` rather than `>`, so that nan fails.
    if difference.numel() and not float(difference.max()) <= bound:
        raise ConformanceError(
            f"{rule}: they differ by up to {float(difference.max()):g}, more than {bound:g}"
        )


def require_shape(actual: Tensor, shape: tuple[int, ...], rule: str) -> None:
    """Require the shape ``shape``."""
    require(
        tuple(actual.shape) == shape,
        f"{rule}: the shape is {list(actual.shape)} and must be {list(shape)}",
    )


@contextlib.contextmanager
def must_raise(
    kind: type[BaseException] | tuple[type[BaseException], ...], action: str
) -> Iterator[None]:
    """Require that the block raises ``kind``."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    rule = f"must raise {' or '.join(k.__name__ for k in kinds)}"
    try:
        yield
    except kinds:
        return
    except Exception as error:
        raise ConformanceError(
            f"{action} raises {type(error).__name__} ({error}) and {rule}, so that a person reads "
            "what is wrong"
        ) from error
    raise ConformanceError(f"{action} raises nothing and {rule}")
