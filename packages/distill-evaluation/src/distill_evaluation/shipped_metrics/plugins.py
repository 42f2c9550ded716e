"""The descriptors of metrics without options of their own. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from attrs import frozen
from distill_protocols import (
    DataError,
    Metric,
    MetricInput,
    MetricInputs,
    MetricNumber,
    MetricParts,
    MetricPlugin,
    Problem,
)
from distill_runtime import UnreadableFileError

from distill_evaluation.judge_files import read_attributes
from distill_evaluation.labels import Attributes, label_prompts


@frozen(kw_only=True)
class NoOptions:
    """A metric without options."""


class _Plugin(MetricPlugin[NoOptions]):
    contract = 2
    config_class: ClassVar[type] = NoOptions


class MotionPlugin(_Plugin):
    """``motion`` and ``flow``: how much moves."""

    name = "motion"
    help = "difference of frames, and length of the optical flow"
    measures_real = True

    def numbers(self, config: NoOptions, inputs: MetricInputs) -> Mapping[str, MetricNumber]:
        return {
            "motion": MetricNumber(
                help="mean absolute difference of neighbouring frames, in brightness", digits=4
            ),
            "flow": MetricNumber(help="mean length of the optical flow, in pixels a frame"),
        }

    def build(self, config: NoOptions, parts: MetricParts) -> Metric:
        from distill_evaluation.shipped_metrics.motion import build

        return build(parts)


class PicturesPlugin(_Plugin):
    """``sharpness``, ``contrast``, ``saturation`` and ``clipped``: what blurs or burns out."""

    name = "pictures"
    help = "sharpness, contrast, saturation of colours, share of clipped values"
    measures_real = True

    def numbers(self, config: NoOptions, inputs: MetricInputs) -> Mapping[str, MetricNumber]:
        return {
            "sharpness": MetricNumber(
                help="variance of the Laplacian of brightness; falls with blur", digits=4
            ),
            "contrast": MetricNumber(help="standard deviation of brightness within a frame"),
            "saturation": MetricNumber(help="saturation of colours; 0 is grey"),
            "clipped": MetricNumber(help="share of values that are black or white"),
        }

    def build(self, config: NoOptions, parts: MetricParts) -> Metric:
        from distill_evaluation.shipped_metrics.pictures import build

        return build(parts)


class DiversityPlugin(_Plugin):
    """``variance``: how different clips of one prompt are."""

    name = "diversity"
    help = "variance of pixels among clips of one prompt"

    def numbers(self, config: NoOptions, inputs: MetricInputs) -> Mapping[str, MetricNumber]:
        return {
            "variance": MetricNumber(
                help="variance of pixels among clips of one prompt; 0 if all are one clip", digits=4
            )
        }

    def build(self, config: NoOptions, parts: MetricParts) -> Metric:
        from distill_evaluation.shipped_metrics.diversity import build

        return build(parts)


class LikenessPlugin(_Plugin):
    """``psnr`` and ``ssim``: how like the reference's clips of the same noise."""

    name = "likeness"
    help = "PSNR and SSIM to the reference entry's clips of the same noise"

    def needs(self, config: NoOptions) -> Collection[MetricInput]:
        return ("reference",)

    def numbers(self, config: NoOptions, inputs: MetricInputs) -> Mapping[str, MetricNumber]:
        return {
            "psnr": MetricNumber(
                help=f"PSNR to {inputs.reference} of the same noise, in dB",
                better="higher",
                digits=1,
            ),
            "ssim": MetricNumber(
                help=f"SSIM to {inputs.reference} of the same noise", better="higher"
            ),
        }

    def build(self, config: NoOptions, parts: MetricParts) -> Metric:
        from distill_evaluation.shipped_metrics.likeness import build

        return build(parts)


class DistancesPlugin(_Plugin):
    """``pixels``, ``latents`` and ``latent_std``: distances that need no network."""

    name = "distances"
    help = "Frechet distances of pixels and of latents, latent standard deviation, to real clips"
    measures_real = True

    def needs(self, config: NoOptions) -> Collection[MetricInput]:
        return ("real_latents",)

    def numbers(self, config: NoOptions, inputs: MetricInputs) -> Mapping[str, MetricNumber]:
        return {
            "pixels": MetricNumber(
                help="Frechet distance of pixels and their temporal differences, in 48 whitened "
                "components of real clips",
                better="lower",
                digits=2,
            ),
            "latents": MetricNumber(
                help="Frechet distance of latents, in 64 whitened components of real ones",
                better="lower",
                digits=2,
            ),
            "latent_std": MetricNumber(
                help="standard deviation of latents over that of real ones: above 1 too sharp, "
                "below 1 too soft",
                better="near_1",
                digits=2,
            ),
        }

    def build(self, config: NoOptions, parts: MetricParts) -> Metric:
        from distill_evaluation.shipped_metrics.distances import build

        return build(parts)


class AttributesPlugin(_Plugin):
    """A number for each question that the judge answers: how often it sees what was asked for."""

    name = "attributes"
    help = "share of clips in which the judge sees what the prompt names"

    def needs(self, config: NoOptions) -> Collection[MetricInput]:
        return ("judge",)

    def numbers(self, config: NoOptions, inputs: MetricInputs) -> Mapping[str, MetricNumber]:
        return {
            attribute: MetricNumber(
                help=f"share of clips in which the judge sees the {attribute} of the prompt",
                better="higher",
                by_judge=True,
            )
            for attribute in _attributes(inputs)
        }

    def input_problems(self, config: NoOptions, inputs: MetricInputs) -> Iterator[Problem]:
        try:
            label_prompts(inputs.prompts, _attributes(inputs))
        except DataError as error:
            yield Problem("prompts", str(error))

    def build(self, config: NoOptions, parts: MetricParts) -> Metric:
        from distill_evaluation.shipped_metrics.attributes import build

        return build(parts)


def _attributes(inputs: MetricInputs) -> Attributes:
    """Read what the judge is asked; nothing where its settings cannot be read."""
    try:
        return {} if inputs.judge is None else read_attributes(Path(inputs.judge))
    except UnreadableFileError:
        return {}


motion = MotionPlugin()
pictures = PicturesPlugin()
diversity = DiversityPlugin()
likeness = LikenessPlugin()
distances = DistancesPlugin()
attributes = AttributesPlugin()
