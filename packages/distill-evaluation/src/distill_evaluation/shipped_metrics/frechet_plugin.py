"""The `frechet` metric and its networks. Imports no torch."""

from __future__ import annotations

import importlib.util
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

from distill_evaluation.shipped_metrics.configs import FrechetConfig


class FrechetPlugin(MetricPlugin[FrechetConfig]):
    """``fd``, and ``fd_<network>`` for each network."""

    name = "frechet"
    help = "Frechet distance to real clips, in the features of a judge or of any network"
    contract = 2
    config_class: ClassVar[type] = FrechetConfig
    measures_real = True

    def needs(self, config: FrechetConfig) -> Collection[MetricInput]:
        if not config.networks:
            return ("judge",)
        if any(network.reference is None for network in config.networks.values()):
            return ("real_latents",)
        return ()

    def numbers(self, config: FrechetConfig, inputs: MetricInputs) -> Mapping[str, MetricNumber]:
        numbers = {}
        if inputs.judge is not None:
            numbers["fd"] = MetricNumber(
                help="Frechet distance to real clips in the judge's features",
                better="lower",
                digits=1,
                by_judge=True,
            )
        for name in config.networks:
            numbers[f"fd_{name}"] = MetricNumber(
                help=f"Frechet distance to real clips in the features of {name}",
                better="lower",
                digits=1,
            )
        return numbers

    def problems(self, config: FrechetConfig, inputs: MetricInputs) -> Iterator[Problem]:
        for name, network in config.networks.items():
            package = network.function.partition(":")[0].partition(".")[0]
            if importlib.util.find_spec(package) is None:
                yield Problem(
                    ("networks", name, "function"),
                    f"{network.function!r}: no package {package!r} is installed. Install the one "
                    "that has the network, or write the module into a package of your own",
                )
            for key, file in (("weights", network.weights), ("reference", network.reference)):
                if file is not None and not Path(file).is_file():
                    yield Problem(
                        ("networks", name, key),
                        f"there is no file {file}; it must be a safetensors file. Convert a "
                        "checkpoint of torch.save with safetensors.torch.save_file",
                    )

    def build(self, config: FrechetConfig, parts: MetricParts) -> Metric:
        from distill_evaluation.shipped_metrics.frechet import build

        return build(config, parts)


frechet = FrechetPlugin()
