"""Configuration of the `report` callback. Imports no torch."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from attrs import Attribute, field, frozen
from distill_protocols import SamplerSpec
from distill_protocols.validators import at_least, file_name_problem, within


def _check_not_empty(instance: object, attribute: Attribute[Any], value: Sized) -> None:
    if not value:
        raise ValueError(
            f"{attribute.name} must not be empty: there would be nothing to show. Leave "
            "the report out if none is wanted"
        )


def _check_entries(instance: object, attribute: Attribute[Any], value: dict[str, Any]) -> None:
    _check_not_empty(instance, attribute, value)
    for name in value:
        if problem := file_name_problem(name):
            raise ValueError(f"entry {problem}")


@frozen(kw_only=True)
class ReportEntry:
    """One row of the report.

    Attributes:
        role: whose weights sample.
        sampler: how it samples; left out, as the method samples its student.
        ema: the role's averaged weights instead of the live ones.
        sheet: show it in the contact sheet, the MP4 and the clips.
        during: measure it during the run too, if ``every_steps`` asks for that. The weights of a
            frozen role do not move, so it is measured once and its numbers are repeated.
    """

    role: str
    sampler: SamplerSpec | None = None
    ema: bool = False
    sheet: bool = True
    during: bool = True


@frozen(kw_only=True)
class ReportConfig:
    """What is measured at the end of a run, and at intervals during it.

    Attributes:
        sheet_prompts: prompts shown in the contact sheet, the MP4 and the clips; any captions.
        entries: name -> what to sample; the order is that of the table, and clips of each lie in
            a folder of its name.
        prompts: text file, one prompt a line, of which clips are measured; left out, those of the
            sheet. Any captions; where a judge answers questions, each must name one class of every
            attribute.
        clips_per_prompt: clips sampled of each prompt, by every entry from the same noise. A
            Frechet distance falls with their number: compare equal ones only.
        metrics: what is measured: names of metrics, or a mapping of names to their options. Left
            out, all shipped ones that need nothing beyond this section: ``motion``, ``pictures``
            and ``diversity`` always, ``frechet`` and ``attributes`` with a judge, ``distances``
            with real latents, ``likeness`` with a reference.
        judge: folder of a judge (judge.json, judge.safetensors, reference.safetensors).
        real_latents: safetensors file with ``latents`` of real clips, not normalised, as a data set
            holds them: what metrics compare with. As many as an entry has clips, the last ones of
            the file, are kept out and measured as an entry is: what real clips come to.
        reference: name of an entry, such as the teacher's, whose clips the others' are compared
            with: they are of the same prompts and the same noise.
        seed: of the initial noise, apart from the run's own generators.
        fps: of the MP4 and the clips.
        every_steps: also measure the entries in every so many iterations, as metrics
            ``report/<entry>/<number>``, by which checkpoints can be kept. 0: only at the end.
    """

    sheet_prompts: tuple[str, ...] = field(validator=_check_not_empty)
    entries: dict[str, ReportEntry] = field(validator=_check_entries)
    prompts: str | None = field(default=None, metadata={"path": ()})
    clips_per_prompt: int = field(
        default=6, validator=at_least(2, "the variance among clips of one prompt is reported")
    )
    metrics: dict[str, Any] | None = field(default=None, metadata={"plugins": "distill.metrics"})
    judge: str | None = field(default=None, metadata={"path": ()})
    real_latents: str | None = field(default=None, metadata={"path": ()})
    reference: str | None = None
    seed: int = 1234
    fps: int = field(default=6, validator=within(1, 240, "players show no other speeds"))
    every_steps: int = field(
        default=0,
        validator=at_least(0, "it counts iterations; 0 measures only at the end of the run"),
    )


def metric_name(entry: str, number: str) -> str:
    """Name the metric of an entry by its number, such as ``fd`` or ``variance``."""
    return f"report/{entry}/{number}"
