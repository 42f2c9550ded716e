"""Configuration of the `report` callback. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any

from attrs import Attribute, field, frozen
from distill_protocols import SamplerSpec
from distill_protocols.validators import at_least


def _check_not_empty(instance: object, attribute: Attribute[Any], value: Sized) -> None:
    if not value:
        raise ValueError(
            f"{attribute.name} must not be empty: there would be nothing to show. Leave "
            "the report out if none is wanted"
        )


DISTANCES = ("pixels", "latents", "latent_std")
"""Names of the numbers that ``real_latents`` adds."""


@frozen(kw_only=True)
class ReportEntry:
    """One row of the report.

    Attributes:
        role: whose weights sample.
        sampler: how it samples; left out, as the method samples its student.
        ema: the role's averaged weights instead of the live ones.
        sheet: show it in the contact sheet and the MP4.
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
        judge: folder of the judge (judge.json, judge.safetensors, reference.safetensors).
        prompts: text file, one prompt a line; each must name one class of every attribute.
        clips_per_prompt: clips sampled of each prompt, by every entry from the same noise. The
            Frechet distance falls with their number: compare equal ones only.
        sheet_prompts: prompts shown in the contact sheet and the MP4.
        entries: name -> what to sample; the order is that of the table.
        seed: of the initial noise, apart from the run's own generators.
        fps: of the MP4.
        real_latents: safetensors file with ``latents`` of real clips, not normalised, as a data set
            holds them: every entry is also compared with these in pixels and in latents, by numbers
            that nobody tuned by (``distances``). As many as an entry has clips, the last ones of
            the file, are kept out and compared with the others: what real clips come to.
        every_steps: also measure the entries in every so many iterations, as metrics
            ``report/<entry>/fd``, ``report/<entry>/<attribute>`` (accuracy) and
            ``report/<entry>/variance``, by which checkpoints can be kept; with ``real_latents``
            ``pixels``, ``latents`` and ``latent_std`` too. 0: only at the end.
    """

    judge: str = field(metadata={"path": ()})
    prompts: str = field(metadata={"path": ()})
    clips_per_prompt: int = field(
        default=6, validator=at_least(2, "the variance among clips of one prompt is reported")
    )
    sheet_prompts: tuple[str, ...] = field(validator=_check_not_empty)
    entries: dict[str, ReportEntry] = field(validator=_check_not_empty)
    seed: int = 1234
    real_latents: str | None = field(default=None, metadata={"path": ()})
    fps: int = field(default=6, validator=at_least(1, "the MP4 shows at least one a second"))
    every_steps: int = field(
        default=0,
        validator=at_least(0, "it counts iterations; 0 measures only at the end of the run"),
    )

    def metric_names(self, attributes: Iterable[str]) -> tuple[str, ...]:
        """List what is measured during the run by a judge of these ``attributes``."""
        if not self.every_steps:
            return ()
        numbers = ("fd", *attributes, "variance")
        if self.real_latents is not None:
            numbers += DISTANCES
        entries = [name for name, entry in self.entries.items() if entry.during]
        return tuple(metric_name(entry, number) for entry in entries for number in numbers)


def metric_name(entry: str, number: str) -> str:
    """Name the metric of an entry: ``fd``, ``variance``, or an attribute of the judge."""
    return f"report/{entry}/{number}"
