"""Frechet distances between features of samples and of real clips, in any network's features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

import torch
from attrs import frozen
from distill_protocols import DataError, Metric, MetricParts, Samples, WeightsError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distill_evaluation.judge_files import REFERENCE
from distill_evaluation.metrics import FeatureStatistics, feature_statistics, frechet_distance
from distill_evaluation.shipped_metrics.configs import FeatureNetworkConfig, FrechetConfig
from distill_evaluation.shipped_metrics.judging import judge_of, judged_features


@frozen(eq=False, kw_only=True)
class FeatureSpace:
    """One network, and what real clips are like in its features.

    Attributes:
        name: for messages.
        features: gives [P K, D] of samples, on the CPU.
        reference: of real clips.
    """

    name: str
    features: Callable[[Samples], Tensor]
    reference: FeatureStatistics


@frozen(eq=False)
class FrechetDistances(Metric):
    """A distance in each of several feature spaces, by the names of the numbers."""

    spaces: Mapping[str, FeatureSpace]

    def measure(self, samples: Samples) -> dict[str, Tensor]:
        return {
            number: samples.by_prompt(space.features(samples))
            for number, space in self.spaces.items()
        }

    def combine(self, rows: Mapping[str, Tensor]) -> dict[str, float]:
        return {
            number: frechet_distance(
                feature_statistics(features.flatten(0, 1)), self.spaces[number].reference
            )
            for number, features in rows.items()
        }

    def check(self, blank: Samples) -> None:
        for space in self.spaces.values():
            features = space.features(blank)
            if features.ndim != 2:
                raise ValueError(
                    f"{space.name} gives features of shape {tuple(features.shape)}; it must give "
                    "[N, D], one row a clip"
                )
            if features.shape[1] != space.reference.mean.numel():
                raise ValueError(
                    f"the reference of {space.name} has {space.reference.mean.numel()} features a "
                    f"clip, and the network gives {features.shape[1]}; they belong to different "
                    "networks. Make the reference anew"
                )


def build(config: FrechetConfig, parts: MetricParts) -> Metric:
    """Make the metric with all of its networks.

    Raises:
        WeightsError: a network cannot be made, or its weights are not its own.
        DataError: a reference cannot be read.
    """
    spaces = {}
    if parts.inputs.judge is not None:
        judge = judge_of(parts)
        spaces["fd"] = FeatureSpace(
            name=f"the judge in {parts.inputs.judge}",
            features=lambda samples: judged_features(judge, samples),
            reference=feature_statistics(read_reference(parts.inputs.judge)),
        )
    for name, network in config.networks.items():
        spaces[f"fd_{name}"] = _space_of(name, network, parts)
    return FrechetDistances(spaces)


def _space_of(name: str, config: FeatureNetworkConfig, parts: MetricParts) -> FeatureSpace:
    network = load_network(config.function, Path(config.weights)).to(parts.device)

    def features(clips: Tensor) -> Tensor:
        with torch.no_grad():
            chunks = clips.split(config.batch)
            return torch.cat([network(chunk.to(parts.device)).float().cpu() for chunk in chunks])

    if config.reference is None:
        assert parts.real is not None, "the plugin states that it needs them"
        reference = features(parts.real.clips)
    else:
        reference = read_features(
            Path(config.reference), "Write one with the network's features of real clips."
        )
    return FeatureSpace(
        name=f"network {name}",
        features=lambda samples: features(samples.all_clips),
        reference=feature_statistics(reference),
    )


def load_network(function: str, weights: Path) -> nn.Module:
    """Make the network that ``package.module:function`` returns, with the weights of a safetensors
    file.

    Raises:
        WeightsError: the function is not there or returns no module, or the file's names and
            shapes are not those of the module.
    """
    module_name, name = function.split(":")
    try:
        network = vars(import_module(module_name))[name]()
    except (ImportError, KeyError) as error:
        raise WeightsError(
            f"{function!r} cannot be imported ({error}); it must be a function of an installed "
            "package that returns the network. Check the name, or install the package."
        ) from error
    if not isinstance(network, nn.Module):
        raise WeightsError(
            f"{function!r} returns a {type(network).__name__}, and must return a torch.nn.Module "
            "that turns clips [N, 3, F, H, W] into features [N, D]."
        )
    try:
        network.load_state_dict(load_file(weights))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise WeightsError(
            f"{weights} does not hold the weights of {function!r} ({error}). Save them with "
            "safetensors.torch.save_file(network.state_dict(), file)."
        ) from error
    return network.eval().requires_grad_(False)


def read_reference(judge: Path) -> Tensor:
    """Read features [N, D] of real clips that neither teacher nor judge was trained on.

    Raises:
        DataError: there is no such file, or it is damaged.
    """
    return read_features(
        judge / REFERENCE, "Write one with the judge's folder, as tools/tiny_wan does."
    )


def read_features(file: Path, way_out: str) -> Tensor:
    """Read ``features`` [N, D] from a safetensors file. DataError if it cannot be read."""
    if not file.is_file():
        raise DataError(
            f"{file} is missing; a Frechet distance is measured against real clips' features. "
            f"{way_out}"
        )
    try:
        features = load_file(file)["features"]
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"their shape is {tuple(features.shape)}, and must be [N, D], N >= 2")
    except (SafetensorError, OSError, RuntimeError, KeyError, ValueError) as error:
        raise DataError(
            f"{file} is no safetensors file with `features` ({error}). {way_out}"
        ) from error
    return features
