"""FVD by the I3D network of its authors' common copy, which is not shipped. Imports no torch.

FVD (Unterthiner et al. 2018, arXiv 1812.01717) is the Frechet distance in features of an I3D that
was trained on Kinetics-400. The copy that papers compare by is `i3d_torchscript.pt` of StyleGAN-V
(Skorokhodov et al. 2022, github.com/universome/fvd-comparison). Its numbers depend on clip length,
frame rate and number of clips: compare equal ones only, and publish them with your own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from distill_protocols import (
    Metric,
    MetricInput,
    MetricInputs,
    MetricNumber,
    MetricParts,
    MetricPlugin,
    Problem,
)

from distill_evaluation.shipped_metrics.configs import FvdConfig


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
        from distill_evaluation.shipped_metrics.i3d import build

        return build(config, parts)


fvd = FvdPlugin()
