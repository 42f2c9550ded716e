"""VBench's quality dimensions, by VBench itself, which is not shipped. Imports no torch.

VBench (Huang et al. 2023, arXiv 2311.17982; package `vbench`) scores videos by a dozen published
networks, which it downloads on its own. In its mode for custom videos, any prompts will do. Each
process lets it score the clips of its own prompts, from MP4 files in a temporary folder.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from attrs import Attribute, field, frozen
from distill_protocols import (
    DataError,
    Metric,
    MetricInputs,
    MetricNumber,
    MetricParts,
    MetricPlugin,
    Problem,
    Samples,
)

if TYPE_CHECKING:
    from torch import Tensor

DIMENSIONS: Mapping[str, str] = {
    "subject_consistency": "whether the subject looks the same in all frames (DINO)",
    "background_consistency": "whether the background looks the same in all frames (CLIP)",
    "motion_smoothness": "whether motion follows physics (AMT)",
    "dynamic_degree": "share of clips with large motion (RAFT)",
    "aesthetic_quality": "aesthetic score of frames (LAION)",
    "imaging_quality": "distortion of frames (MUSIQ)",
}
"""Those that VBench measures of any videos, and what it measures each with."""


def _check_dimensions(_: object, __: Attribute[Any], value: tuple[str, ...]) -> None:
    unknown = [name for name in value if name not in DIMENSIONS]
    if unknown or not value or len(set(value)) < len(value):
        raise ValueError(
            f"{list(value)} must name one or more of {', '.join(DIMENSIONS)}, each once: VBench "
            "measures no others of prompts that are not its own"
        )


@frozen(kw_only=True)
class VbenchConfig:
    """Dimensions of VBench, each as ``vbench_<dimension>``: the mean of what VBench says of each
    clip.

    Attributes:
        dimensions: which of them.
    """

    dimensions: tuple[str, ...] = field(default=tuple(DIMENSIONS), validator=_check_dimensions)


class VbenchPlugin(MetricPlugin[VbenchConfig]):
    """``vbench_<dimension>``; needs the package `vbench` and the networks that it downloads."""

    name = "vbench"
    help = "VBench's dimensions of video quality; needs the package vbench, and a GPU"
    contract = 2
    config_class: ClassVar[type] = VbenchConfig
    measures_real = True

    def numbers(self, config: VbenchConfig, inputs: MetricInputs) -> Mapping[str, MetricNumber]:
        return {
            f"vbench_{name}": MetricNumber(help=f"VBench: {DIMENSIONS[name]}", better="higher")
            if name != "dynamic_degree"
            else MetricNumber(help=f"VBench: {DIMENSIONS[name]}")
            for name in config.dimensions
        }

    def problems(self, config: VbenchConfig, inputs: MetricInputs) -> Iterator[Problem]:
        if importlib.util.find_spec("vbench") is None:
            yield Problem(
                (),
                "the package vbench is not installed, and nothing else can measure this. Install "
                "it as github.com/Vchitect/VBench says, with the networks that it downloads into "
                "~/.cache/vbench, or leave the metric out",
            )

    def build(self, config: VbenchConfig, parts: MetricParts) -> Metric:
        """Make the metric.

        Raises:
            DataError: the package is not installed.
        """
        for problem in self.problems(config, parts.inputs):
            raise DataError(f"metric vbench: {problem.message}.")
        return VbenchScores(config.dimensions, parts.inputs.fps, str(parts.device))


@frozen(eq=False)
class VbenchScores(Metric):
    """Scores of each clip, by VBench.

    Attributes:
        dimensions: what it scores.
        fps: of the files that it reads.
        device: where its networks compute.
    """

    dimensions: tuple[str, ...]
    fps: float
    device: str

    def measure(self, samples: Samples) -> dict[str, Tensor]:
        import torch
        from distill_media import write_mp4
        from distill_runtime import to_uint8

        with tempfile.TemporaryDirectory() as name:
            videos = Path(name) / "videos"
            videos.mkdir()
            for number, clip in enumerate(to_uint8(samples.all_clips).numpy()):
                write_mp4(clip, videos / f"{number:06}.mp4", fps=self.fps, smallest_side=1)
            scores = self._score(videos, Path(name) / "results")
        return {
            f"vbench_{dimension}": samples.by_prompt(torch.tensor(values))
            for dimension, values in scores.items()
        }

    def combine(self, rows: Mapping[str, Tensor]) -> dict[str, float]:
        return {name: float(values.double().mean()) for name, values in rows.items()}

    def check(self, blank: Samples) -> None:
        """Do nothing: its networks take minutes to load, and clips of any size."""

    def _score(self, videos: Path, results: Path) -> dict[str, list[float]]:
        """Let VBench score a folder; return the scores by dimension, in the order of the files.

        Raises:
            DataError: it did not score each file.
        """
        # VBench is not installed where this is type-checked.
        vbench = cast(Any, __import__("vbench"))
        info = Path(vbench.__file__).parent / "VBench_full_info.json"
        vbench.VBench(self.device, str(info), str(results)).evaluate(
            videos_path=str(videos),
            name="report",
            dimension_list=list(self.dimensions),
            mode="custom_input",
        )
        said = json.loads((results / "report_eval_results.json").read_text())
        names = sorted(path.name for path in videos.iterdir())
        scores = {}
        for dimension in self.dimensions:
            _, by_video = said[dimension]
            values = {Path(one["video_path"]).name: float(one["video_results"]) for one in by_video}
            if sorted(values) != names:
                raise DataError(
                    f"VBench scored {len(values)} of {len(names)} clips in {dimension}, and each "
                    "must have a score. See what it printed; a smaller set of dimensions may do."
                )
            scores[dimension] = [values[name] for name in names]
        return scores


vbench = VbenchPlugin()
