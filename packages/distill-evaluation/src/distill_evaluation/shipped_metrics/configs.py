"""Options of the metrics that have some. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from attrs import Attribute, field, frozen
from distill_protocols.validators import at_least

_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def _check_function(_: object, __: Attribute[Any], value: str) -> None:
    if not _FUNCTION.fullmatch(value):
        raise ValueError(
            f"{value!r} must be 'package.module:function', of an installed package; the function "
            "returns the network, and its weights are read from a safetensors file"
        )


def _check_names(_: object, __: Attribute[Any], value: Mapping[str, object]) -> None:
    for name in value:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(
                f"{name!r} must consist of letters, digits, '_', '-' and '.': it is part of the "
                "number's name, 'fd_<network>'"
            )


@frozen(kw_only=True)
class FeatureNetworkConfig:
    """A network whose features of clips are compared.

    Attributes:
        function: ``package.module:function`` of an installed package. It takes no arguments and
            returns a ``torch.nn.Module`` that turns clips [N, 3, F, H, W] in [0, 1] into features
            [N, D]; sizes and ranges that its trunk wants are its own matter.
        weights: safetensors file with all of its weights and buffers. No pickle is read, and no
            program that stands in a file is run.
        reference: safetensors file with ``features`` [N, D] of real clips; left out, those of the
            report's ``real_latents``.
        batch: clips a call.
    """

    function: str = field(validator=_check_function)
    weights: str = field(metadata={"path": ()})
    reference: str | None = field(default=None, metadata={"path": ()})
    batch: int = field(default=16, validator=at_least(1, "a call takes a clip or more"))


@frozen(kw_only=True)
class FrechetConfig:
    """Frechet distances to real clips: ``fd`` in the judge's features, where the report has a
    judge, and ``fd_<network>`` in those of others.

    Attributes:
        networks: name -> a network.
    """

    networks: dict[str, FeatureNetworkConfig] = field(factory=dict, validator=_check_names)


I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
"""Of the file that is published as `i3d_torchscript.pt`."""


def _check_sha256(_: object, __: Attribute[Any], value: str) -> None:
    if not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{value!r} must be the 64 hexadecimal digits of a SHA-256")


@frozen(kw_only=True)
class FvdConfig:
    """FVD to the report's real clips, in features of I3D.

    Attributes:
        network: `i3d_torchscript.pt`; get it from where github.com/universome/fvd-comparison
            says.
        sha256: of that file. A TorchScript file is a program, so only this one is run.
        batch: clips a call; they are scaled to 224 x 224.
    """

    network: str = field(metadata={"path": ()})
    sha256: str = field(default=I3D_SHA256, validator=_check_sha256)
    batch: int = field(default=4, validator=at_least(1, "a call takes a clip or more"))
