"""The files of a report: report.json, the contact sheet, the film, and a clip of each prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen
from distill_media import SheetRow, write_contact_sheet, write_mp4, write_sheet_mp4
from distill_protocols import MetricNumber, SamplerSpec
from distill_runtime import json_text, replace_file, replace_folder

from distill_evaluation.config import ReportConfig, metric_name
from distill_evaluation.judge import Judge
from distill_evaluation.shipped_metrics.frechet import read_reference

CLIPS = "report"
"""Folder of the clips, in the output folder."""
SMALLEST_SIDE = 128
"""Smaller clips are enlarged by a whole factor, so that people can see them."""


@frozen(kw_only=True)
class EntryReport:
    """One row of the report: quality and cost of one entry.

    Attributes:
        weights: ``ema`` or ``live``.
        clips: that were measured.
        numbers: what the metrics give, by name.
        seconds_per_clip: wall time of denoising alone (no text encoder, no VAE), in batches of
            ``CHUNK``: on several ranks, rank 0's for its own clips.
    """

    name: str
    weights: str
    sampler: SamplerSpec
    clips: int
    numbers: Mapping[str, float]
    seconds_per_clip: float
    model_calls_per_clip: int

    def by_metric_name(self) -> dict[str, float]:
        """Return its numbers by the names under which a run logs them."""
        return {metric_name(self.name, number): value for number, value in self.numbers.items()}


def entry_record(
    row: EntryReport, attributes: Sequence[str], *, distances: bool
) -> dict[str, object]:
    """Return an entry of report.json.

    Beside ``metrics`` it has the numbers under the names that they had before there were metrics.
    """
    numbers = row.numbers
    accuracy = {name: numbers[name] for name in attributes if name in numbers}
    compared = ("pixels", "latents", "latent_std")
    return {
        "name": row.name,
        "weights": row.weights,
        "sampler": attrs.asdict(row.sampler),
        "clips": row.clips,
        "metrics": dict(numbers),
        "frechet_distance": numbers.get("fd"),
        "accuracy": accuracy,
        "within_caption_variance": numbers.get("variance"),
        "seconds_per_clip": row.seconds_per_clip,
        "model_calls_per_clip": row.model_calls_per_clip,
        "distances": {name: numbers[name] for name in compared} if distances else None,
    }


def describe_judge(config: ReportConfig, judge: Judge | None) -> dict[str, Any]:
    """Return what report.json says of the judge; nothing without one."""
    if judge is None or config.judge is None:
        return {}
    return {
        "reference_clips": len(read_reference(Path(config.judge))),
        "judge": {"grey": judge.network.config.grey, "attributes": list(judge.attributes)},
    }


def metric_table(numbers: Mapping[str, MetricNumber]) -> dict[str, dict[str, str | None]]:
    """Return what report.json says of each number."""
    return {
        name: {"help": number.help, "better": number.better} for name, number in numbers.items()
    }


def write_report(
    folder: Path, report: Mapping[str, object], sheets: Sequence[SheetRow], config: ReportConfig
) -> None:
    """Write all files of a report, each whole or not at all; report.json comes last, as it names
    the clips."""
    prompts = config.sheet_prompts
    named: dict[str, object] = {}
    if sheets:
        write_contact_sheet(sheets, prompts, folder / "contact_sheet.png")
        write_sheet_mp4(sheets, prompts, folder / "clips.mp4", fps=config.fps)
        with replace_folder(folder / CLIPS, only_writer=True) as staging:
            for row in sheets:
                files = [f"{number:03}.mp4" for number in range(len(prompts))]
                for file, clip in zip(files, row.clips, strict=True):
                    write_mp4(
                        clip,
                        staging / row.label / file,
                        fps=config.fps,
                        smallest_side=SMALLEST_SIDE,
                    )
                named[row.label] = {"folder": f"{CLIPS}/{row.label}", "files": files}
    clips = {"prompts": list(prompts), "fps": config.fps, "entries": named}
    with replace_file(folder / "report.json") as path:
        path.write_text(json_text({**report, "clips": clips}))
