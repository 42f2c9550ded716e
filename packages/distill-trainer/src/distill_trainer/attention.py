"""torch's own flash attention in another version, for all roles of a run."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from attrs import frozen
from distill_protocols import CapabilityError

if TYPE_CHECKING:
    import torch


@frozen(kw_only=True)
class FlashVersion:
    """A version of flash attention that torch's ``scaled_dot_product_attention`` can call.

    Attributes:
        implementation: as ``torch.nn.attention.activate_flash_attention_impl`` calls it.
        package: that has its kernels; torch brings none.
        capabilities: first numbers of the compute capabilities that its kernels are for.
    """

    implementation: str
    package: str
    capabilities: tuple[int, ...]


FLASH_VERSIONS: Mapping[str, FlashVersion] = MappingProxyType(
    {
        "flash3": FlashVersion(
            implementation="FA3", package="flash_attn_interface", capabilities=(9,)
        ),
        "flash4": FlashVersion(implementation="FA4", package="flash_attn", capabilities=(9, 10)),
    }
)
"""By the name that ``TrainingConfig.attention_backend`` has for them."""


def flash_problem(name: str) -> str | None:
    """Say why the version ``name`` is not installed here; None where it is. No torch."""
    package = FLASH_VERSIONS[name].package
    if importlib.util.find_spec(package) is not None:
        return None
    return (
        f"{name!r} needs the package {package}, which is not installed here: torch has no such "
        "kernels of its own. Install it, or leave the key out for torch's own choice"
    )


@contextlib.contextmanager
def use_flash_version(name: str | None, device: torch.device) -> Iterator[None]:
    """Within: wherever torch chooses its flash kernel, it takes that of version ``name``.

    torch has one such switch for the whole process, so no role can differ in it.

    Args:
        name: one of ``FLASH_VERSIONS``; any other, or None, changes nothing.

    Raises:
        CapabilityError: the device, or the installed package, cannot run it.
    """
    if name is None or name not in FLASH_VERSIONS:
        yield
        return
    from torch.cuda import get_device_capability
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    version = FLASH_VERSIONS[name]
    way_out = "Leave training.attention_backend out for torch's own choice."
    if device.type != "cuda" or get_device_capability(device)[0] not in version.capabilities:
        at = " or ".join(f"{major}.x" for major in version.capabilities)
        raise CapabilityError(
            f"attention backend {name!r} does not run on {device}: its kernels are for CUDA "
            f"devices of compute capability {at}. {way_out}"
        )
    try:
        activate_flash_attention_impl(version.implementation)
    except (ImportError, RuntimeError, ValueError) as error:
        raise CapabilityError(
            f"attention backend {name!r}: torch cannot register {version.implementation} of the "
            f"package {version.package}: {error}. {way_out}"
        ) from error
    try:
        yield
    finally:
        restore_flash_attention_impl()
