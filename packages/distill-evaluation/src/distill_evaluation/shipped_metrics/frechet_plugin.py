"""The `frechet` metric and its networks. Imports no torch."""

from __future__ import annotations

import importlib.util
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
        return import_module("distill_evaluation.shipped_metrics.frechet").build(config, parts)


frechet = FrechetPlugin()
