"""FVD by the I3D network of its authors' common copy, which is not shipped. Imports no torch.

FVD (Unterthiner et al. 2018, arXiv 1812.01717) is the Frechet distance in features of an I3D that
was trained on Kinetics-400. The copy that papers compare by is `i3d_torchscript.pt` of StyleGAN-V
(Skorokhodov et al. 2022, github.com/universome/fvd-comparison). Its numbers depend on clip length,
frame rate and number of clips: compare equal ones only, and publish them with your own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from attrs import Attribute, field, frozen
from distill_protocols import (
    Metric,
    MetricInput,
    MetricInputs,
    MetricNumber,
    MetricParts,
    MetricPlugin,
    Problem,
)
from distill_protocols.validators import at_least

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


class FvdPlugin(MetricPlugin[FvdConfig]):
    """``fvd``; needs the I3D file, and real clips."""

    name = "fvd"
    help = "FVD by I3D; needs i3d_torchscript.pt, which is not shipped"
    contract = 2
    config_class: ClassVar[type] = FvdConfig
    measures_real = True

    def needs(self, config: FvdConfig) -> Collection[MetricInput]:
        return ("real_latents",)

    def numbers(self, config: FvdConfig, inputs: MetricInputs) -> Mapping[str, MetricNumber]:
        return {"fvd": MetricNumber(help="FVD to real clips, by I3D", better="lower", digits=1)}

    def problems(self, config: FvdConfig, inputs: MetricInputs) -> Iterator[Problem]:
        if not Path(config.network).is_file():
            yield Problem(
                "network",
                f"there is no file {config.network}; FVD is measured in features of I3D, which "
                "does not ship with this package. Get i3d_torchscript.pt from where "
                "github.com/universome/fvd-comparison says, or measure distances, which need no "
                "network",
            )

    def build(self, config: FvdConfig, parts: MetricParts) -> Metric:
        return import_module("distill_evaluation.shipped_metrics.i3d").build(config, parts)


fvd = FvdPlugin()
