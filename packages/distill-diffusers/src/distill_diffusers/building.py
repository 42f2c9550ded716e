"""Building modules from configurations that may be damaged or hostile."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator, Mapping

from distill_protocols import WeightsError
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

MAX_PARTS = 100_000
"""Modules and parameters of one model; a transformer of 100 blocks has about ten thousand."""
MAX_BUFFER_BYTES = 8 << 30
"""Of all buffers of a module, such as tables of positions, which are computed and not read."""


class _TooManyPartsError(Exception):
    """A configuration asks for more modules than any model has."""


@contextlib.contextmanager
def limited_building(what: str, way_out: str) -> Iterator[None]:
    """Build modules within the block: stop at ``MAX_PARTS``, and turn any error into one.

    A constructor raises whatever its arithmetic raises of wrong numbers, and counts its blocks as
    it makes them, so that nothing but counting stops it in time.

    Args:
        what: which configuration builds which class, for the message.
        way_out: its last sentence.

    Raises:
        WeightsError: the block raised, or has built too much.
    """
    own, parts = threading.get_ident(), 0

    def count(*_: object) -> None:
        nonlocal parts
        if threading.get_ident() != own:
            return
        parts += 1
        if parts > MAX_PARTS:
            raise _TooManyPartsError(f"more than {MAX_PARTS:,} modules and parameters")

    hooks = (
        register_module_module_registration_hook(count),
        register_module_parameter_registration_hook(count),
    )
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise WeightsError(f"{what} ({type(error).__name__}: {reason}); {way_out}") from error
    finally:
        for hook in hooks:
            hook.remove()


def check_types(model_class: type[object], config: Mapping[str, object]) -> None:
    """Compare the entries of ``config`` with the defaults of the class, by type.

    A constructor stores most of what it is given, and a text where a number belongs would raise in
    the first call.

    Raises:
        TypeError: an entry has another type.
    """
    for name, parameter in inspect.signature(model_class.__init__).parameters.items():
        default = parameter.default
        if name not in config or default is inspect.Parameter.empty:
            continue
        known, given = _kinds(default), _kinds(config[name])
        # Constructors replace a null that stands for a size or a switch, but no epsilon, and none
        # in a list.
        replaced = config[name] is None and not isinstance(default, float)
        allowed = known | {"null"} if replaced else known
        if known - {"null"} and not given <= allowed:
            raise TypeError(
                f"{name}: {ascii(config[name])[:60]} is {' and '.join(sorted(given))}, where "
                f"{' or '.join(sorted(known))} belongs"
            )


def check_buffers(module: nn.Module) -> None:
    """Refuse a module, on the meta device, whose buffers and plain tables no machine would hold.

    Raises:
        ValueError: they are larger than ``MAX_BUFFER_BYTES``.
    """
    tables = (table for _, _, table in plain_tables(module))
    size = sum(buffer.nbytes for buffer in (*module.buffers(), *tables))
    if size > MAX_BUFFER_BYTES:
        raise ValueError(f"its tables take {size / 1e9:.0f} GB, and no published model has such")


def plain_tables(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield (part, attribute, tensor) of tensors that parts keep as plain attributes.

    Nothing moves, saves or fills them, as they are no buffers: Qwen-Image's rotary tables are
    complex numbers, of which a cast of the module would drop half.
    """
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                yield part, name, value


def _kinds(value: object) -> set[str]:
    if isinstance(value, list | tuple):
        # A list in a list is told apart: [false] in place of a flag would be taken for true.
        nested = {"a list" for item in value if isinstance(item, list | tuple)}
        return nested | {kind for item in value for kind in _kinds(item)}
    if isinstance(value, bool):
        return {"a flag"}
    if isinstance(value, int | float):
        return {"a number"}
    if isinstance(value, str):
        return {"a text"}
    return {"null"} if value is None else {"an object"}
