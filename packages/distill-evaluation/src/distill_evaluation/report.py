"""The `report` callback: the quality of a run's models, as numbers in a table and as pictures.

Every entry samples the same prompts from the same initial noise; a judge was trained on other
clips than the teacher. Prompts are divided among the ranks of the run, each with all of its clips:
a clip depends on its place alone, and of a rank's clips only the rows of metrics go to rank 0. So
the numbers are those of one process, and all ranks have them.

P prompts of this rank, K clips of each.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from attrs import evolve, frozen
from distill_media import SheetRow
from distill_protocols import (
    Callback,
    Condition,
    DataError,
    Metric,
    MetricParts,
    RealClips,
    RowGenerators,
    RunParts,
    RunState,
    SamplerSpec,
    Samples,
    Shared,
    StepRecord,
    StopRequested,
    draw_noise,
    main_part,
)
from distill_runtime import RowPartition, to_uint8
from torch import Tensor

from distill_evaluation.chosen import (
    ChosenMetric,
    chosen_metrics,
    inputs_of,
    measured_prompts,
    measures_entry,
    numbers_of_entry,
)
from distill_evaluation.config import ReportConfig, ReportEntry
from distill_evaluation.distances import read_real_latents
from distill_evaluation.report_files import (
    EntryReport,
    describe_judge,
    entry_record,
    metric_table,
    write_report,
)
from distill_evaluation.report_table import format_table
from distill_evaluation.shipped_metrics.judging import judge_of

CHUNK = 64
"""Most clips sampled at once; bounds memory, and is the batch at which seconds per clip are taken
(less, where a rank has less to do)."""


@frozen(eq=False, kw_only=True)
class Measured:
    """A metric of this report, ready to measure.

    Attributes:
        chosen: which it is.
        metric: the metric itself.
    """

    chosen: ChosenMetric
    metric: Metric


@frozen(eq=False, kw_only=True)
class EntrySamples:
    """What an entry sampled on this rank.

    Attributes:
        partition: which prompts are whose.
        samples: those of this rank.
        seconds_per_clip: of denoising alone.
    """

    partition: RowPartition
    samples: Samples
    seconds_per_clip: float


class ReportCallback(Callback):
    """Writes report.json, contact_sheet.png, clips.mp4 and the folder report/ with a clip of each
    prompt and entry into the output folder, and prints a table. On several ranks all of them
    sample, and rank 0 alone writes and prints.

    With ``every_steps`` it also measures during the run and leaves the numbers in ``run.metrics``;
    the run goes on as if nothing had been measured. Put it behind callbacks that move what it
    measures (averages), as the app does.

    Everything it reads (judge, networks, references, prompts, roles) is read when the run starts,
    so that a wrong path does not end the run at its very end.

    Raises:
        PluginError: a metric is not installed.
        WeightsError, DataError: what a metric reads is missing or misfits, or the prompts are.
        RoleError: an entry names a role that the run has not.
        ConditioningError: an entry is guided, and there is no negative condition.
    """

    name = "report"

    def __init__(self, config: ReportConfig, parts: RunParts) -> None:
        self.config = config
        self.parts = parts
        parts.method.bundle.require_roles({entry.role for entry in config.entries.values()})
        self.prompts = measured_prompts(config)
        self._chosen = chosen_metrics(config)
        self._device = parts.method.bundle[next(iter(config.entries.values())).role].call_device
        real, held_out = self._read_real()
        self._real_clips = None if real is None else len(real.clips)
        metric_parts = self._metric_parts(real)
        self.judge = None if config.judge is None else judge_of(metric_parts)
        self._judge_record = describe_judge(config, self.judge)
        self._metrics = self._build_metrics(metric_parts)
        if any(self._reads_negative(self._spec(entry)) for entry in config.entries.values()):
            parts.conditioning.negative()
        # Encoded now and kept by the provider: a prompt must not fail after days of training.
        for prompts in (self.prompts, config.sheet_prompts):
            parts.conditioning.encode(prompts)
        self._real_numbers = {} if held_out is None else self._measure_real(held_out)
        self._frozen_rows: dict[str, EntryReport] = {}
        self._reference: EntrySamples | None = None

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        if not self.config.every_steps or step.iteration % self.config.every_steps:
            return
        run.check_finite()
        metrics: dict[str, float] = {}
        self._forget_reference()
        for name, entry in self.config.entries.items():
            run.method.stop.poll()  # a report that is left unfinished adds nothing
            if entry.during:
                metrics |= self._row(run, name, entry).by_metric_name()
        run.metrics |= metrics

    def on_train_end(self, run: RunState) -> None:
        try:
            run.method.stop.poll()
            self._report(run)
        except StopRequested as stop:
            # All files are written after the last sampling: now there are none, or the former ones.
            if run.ranks.is_first:
                print(f"report: left out, as the run was stopped ({stop})")

    # -- inside -------------------------------------------------------------------------------

    def _report(self, run: RunState) -> None:
        rows: list[EntryReport] = []
        sheets: list[SheetRow] = []
        self._forget_reference()
        for name, entry in self.config.entries.items():
            rows.append(self._row(run, name, entry))
            if entry.sheet:
                sheets += self._sheet_rows(run, name, entry)
        run.ranks.run_on_first(lambda: self._show(run, rows, sheets))
        for row in rows:
            run.metrics |= row.by_metric_name()

    def _show(self, run: RunState, rows: Sequence[EntryReport], sheets: Sequence[SheetRow]) -> None:
        distances = any(one.chosen.name == "distances" for one in self._metrics)
        report: dict[str, object] = {
            "iteration": run.iteration,
            "method": type(self.parts.method).__name__,
            "update_counts": self.parts.method.update_counts,
            "seed": {"training": run.streams.seed, "report": self.config.seed},
            **self._judge_record,
        }
        if self._real_clips is not None:
            report["real"] = {"clips": self._real_clips, **self._real_numbers}
        numbers = {
            name: number
            for entry in self.config.entries
            for name, number in numbers_of_entry(self.config, self._chosen, entry).items()
        }
        report["metrics"] = metric_table(numbers)
        attributes = () if self.judge is None else tuple(self.judge.attributes)
        report["entries"] = [entry_record(row, attributes, distances=distances) for row in rows]
        write_report(run.output_dir, report, sheets, self.config)
        text = format_table(
            rows, numbers, grey=self.judge is not None and self.judge.network.config.grey
        )
        for tracker in run.trackers:
            tracker.log_text(run.iteration, "report", f"```\n{text}\n```")
        print(f"\n{text}\n\nreport.json, contact_sheet.png, clips.mp4 in {run.output_dir}")

    def _metric_parts(self, real: RealClips | None) -> MetricParts:
        blank = self.parts.adapter.decode(torch.zeros((1, *self.parts.adapter.latent_shape)))
        channels, frames, height, width = blank.shape[1:]
        return MetricParts(
            inputs=inputs_of(self.config, prompts=tuple(self.prompts)),
            clip_shape=(channels, frames, height, width),
            device=self._device,
            real=real,
        )

    def _build_metrics(self, parts: MetricParts) -> list[Measured]:
        """Build all metrics, and send a clip through each, so that sizes that do not fit raise
        now.

        DataError if a metric does not take this run's clips.
        """
        clips = torch.zeros(1, 2, *parts.clip_shape)
        latents = torch.zeros(1, 2, *self.parts.adapter.latent_shape)
        blank = Samples(prompts=(self.prompts[0],), rows=(0,), clips=clips, latents=latents)
        metrics = []
        for chosen in self._chosen:
            metric = chosen.plugin.build(chosen.config, parts)
            compared = evolve(blank, reference=blank, shared=Shared())
            try:
                metric.check(compared)
            except ValueError as error:
                raise DataError(
                    f"metric {chosen.name!r} does not take this run's clips: {error}"
                ) from error
            metrics.append(Measured(chosen=chosen, metric=metric))
        return metrics

    def _read_real(self) -> tuple[RealClips | None, RealClips | None]:
        """Read the real clips: those to compare with, and as many as an entry has that are measured
        as an entry is.

        DataError if they are not of this run's shape, or too few.
        """
        if self.config.real_latents is None:
            return None, None
        file, adapter = Path(self.config.real_latents), self.parts.adapter
        raw = read_real_latents(file)
        kept_out = len(self.prompts) * self.config.clips_per_prompt
        if raw.shape[1:] != tuple(adapter.latent_shape) or len(raw) <= kept_out:
            raise DataError(
                f"{file} holds latents {list(raw.shape)}; there must be [N, "
                f"{', '.join(map(str, adapter.latent_shape))}] of this run's clips, and more than "
                f"the {kept_out} that an entry has, as so many are kept out. Copy more."
            )
        latents = adapter.normalize_latents(raw.to(self._device))
        clips, latents = self._decode(latents), latents.cpu()
        return (
            RealClips(clips=clips[:-kept_out], latents=latents[:-kept_out]),
            RealClips(clips=clips[-kept_out:], latents=latents[-kept_out:]),
        )

    def _measure_real(self, held_out: RealClips) -> dict[str, float]:
        """Measure real clips as an entry is measured. Every rank does all of it: it is not much."""
        shape = (len(self.prompts), self.config.clips_per_prompt)
        samples = Samples(
            prompts=(),
            rows=tuple(range(len(self.prompts))),
            clips=held_out.clips.unflatten(0, shape),
            latents=held_out.latents.unflatten(0, shape),
        )
        numbers: dict[str, float] = {}
        for one in self._metrics:
            if one.chosen.plugin.measures_real:
                numbers |= one.metric.combine(one.metric.measure(samples))
        return numbers

    def _reads_negative(self, spec: SamplerSpec) -> bool:
        return self.parts.adapter.capabilities.reads_negative(*spec.guidances)

    def _spec(self, entry: ReportEntry) -> SamplerSpec:
        spec = entry.sampler or self.parts.method.sampler_spec
        if spec is None:
            raise DataError(
                f"report entry of role {entry.role!r} has no sampler, and the method states none; "
                "it must be known how to sample. Give the entry a sampler."
            )
        return spec

    def _row(self, run: RunState, name: str, entry: ReportEntry) -> EntryReport:
        """Measure an entry; once a run where the weights do not move."""
        if name in self._frozen_rows:
            return self._frozen_rows[name]
        row = self._measure(run, name, entry)
        if not self.parts.method.bundle[entry.role].trainable:
            self._frozen_rows[name] = row
        return row

    @contextlib.contextmanager
    def _weights_of(self, entry: ReportEntry) -> Iterator[None]:
        role = self.parts.method.bundle[entry.role]
        with torch.no_grad(), role.frozen(), role.averaged(ema=entry.ema):
            yield

    def _measure(self, run: RunState, name: str, entry: ReportEntry) -> EntryReport:
        """Sample an entry and measure its clips; all ranks get the row."""
        metrics = [m for m in self._metrics if measures_entry(m.chosen, self.config, name)]
        if name == self.config.reference:
            entry_samples = self._reference_samples(run)
        else:
            entry_samples = self._entry_samples(run, entry)
        samples = entry_samples.samples
        if name != self.config.reference and any(
            "reference" in m.chosen.plugin.needs(m.chosen.config) for m in metrics
        ):
            samples = evolve(samples, reference=self._reference_samples(run).samples)
        gathered = []
        for one in metrics:
            rows = one.metric.measure(samples)
            gathered.append({key: entry_samples.partition.gather(rows[key]) for key in rows})
        return run.ranks.run_on_first(
            lambda: self._entry_report(
                name, entry, _combine(metrics, gathered), entry_samples.seconds_per_clip
            )
        )

    def _entry_report(
        self, name: str, entry: ReportEntry, numbers: dict[str, float], seconds_per_clip: float
    ) -> EntryReport:
        spec = self._spec(entry)
        return EntryReport(
            name=name,
            weights="ema" if entry.ema else "live",
            sampler=spec,
            clips=len(self.prompts) * self.config.clips_per_prompt,
            numbers=numbers,
            seconds_per_clip=seconds_per_clip,
            model_calls_per_clip=spec.calls_per_clip,
        )

    def _entry_samples(self, run: RunState, entry: ReportEntry) -> EntrySamples:
        """Sample and decode the clips of this rank's prompts."""
        each = self.config.clips_per_prompt
        prompts = RowPartition(run.ranks, len(self.prompts))
        rows = [prompt * each + clip for prompt in prompts.own for clip in range(each)]
        cond = self.parts.conditioning.encode(self.prompts)
        with self._weights_of(entry):
            latents, seconds = self._sample(
                run, entry, self._spec(entry), cond, rows, clips_per_prompt=each,
                purpose="report.measure",
            )  # fmt: skip
        samples = Samples(
            prompts=tuple(self.prompts[row] for row in prompts.own),
            rows=tuple(prompts.own),
            clips=self._decode(latents).unflatten(0, (-1, each)),
            latents=latents.cpu().unflatten(0, (-1, each)),
        )
        return EntrySamples(
            partition=prompts, samples=samples, seconds_per_clip=seconds / len(rows)
        )

    def _reference_samples(self, run: RunState) -> EntrySamples:
        """Sample the reference, and keep its clips: until the next measurement, or for the whole
        run if its weights do not move."""
        if self._reference is None:
            assert self.config.reference is not None, "a metric states that it needs one"
            self._reference = self._entry_samples(run, self.config.entries[self.config.reference])
        return self._reference

    def _forget_reference(self) -> None:
        """Drop the reference's clips where its weights have moved since they were made."""
        if self.config.reference is not None:
            role = self.config.entries[self.config.reference].role
            if self.parts.method.bundle[role].trainable:
                self._reference = None

    def _sheet_rows(self, run: RunState, name: str, entry: ReportEntry) -> list[SheetRow]:
        """Sample one row of the sheet: a list of it on rank 0, elsewhere an empty one."""
        prompts = RowPartition(run.ranks, len(self.config.sheet_prompts))
        cond = self.parts.conditioning.encode(self.config.sheet_prompts)
        with self._weights_of(entry):
            latents, _ = self._sample(
                run, entry, self._spec(entry), cond, prompts.own, purpose="report.sheet"
            )
        clips = prompts.gather(self._decode(latents))
        return [] if clips is None else [SheetRow(name, to_uint8(clips).numpy())]

    def _sample(
        self,
        run: RunState,
        entry: ReportEntry,
        spec: SamplerSpec,
        cond: Condition,
        rows: Sequence[int],
        *,
        clips_per_prompt: int = 1,
        purpose: str,
    ) -> tuple[Tensor, float]:
        """Sample latents [len(rows), C, T, H, W]; return them and the seconds it took.

        No generator of the run is touched.

        Args:
            cond: of all prompts.
            rows: which of all clips, ``clips_per_prompt`` of each prompt after each other; each
                has noise of its own, whichever rank samples it.
        """
        adapter = self.parts.adapter
        device = next(iter(cond.tensors.values())).device
        negative = self.parts.conditioning.negative() if self._reads_negative(spec) else None
        chunks = [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]
        generators = [
            RowGenerators.seeded(self.config.seed, purpose, chunk, device) for chunk in chunks
        ]
        noise = [draw_noise(adapter, adapter.latent_shape, own) for own in generators]
        parts = []
        start = time.perf_counter()
        for i, chunk in enumerate(chunks):
            run.report_progress(f"report: clips of {entry.role}", i, len(chunks))
            clips = adapter.sample(
                entry.role,
                spec,
                noise[i],
                cond[torch.tensor(chunk) // clips_per_prompt],
                neg_cond=negative,
                generators=generators[i],
                poll=self.parts.method.stop.poll,
            )
            parts.append(main_part(clips))
        run.report_progress(f"report: clips of {entry.role}", len(chunks), len(chunks))
        latents = torch.cat(parts).cpu()  # waits for the device, so that the clock is right
        return latents.to(device), time.perf_counter() - start

    def _decode(self, latents: Tensor) -> Tensor:
        """Decode latents to clips [N, 3, F, H_px, W_px] on the CPU."""
        clips = []
        for part in latents.split(CHUNK):
            self.parts.method.stop.poll()
            clips.append(self.parts.adapter.decode(part).cpu())
        return torch.cat(clips)


def _combine(
    metrics: Sequence[Measured], gathered: Sequence[Mapping[str, Tensor | None]]
) -> dict[str, float]:
    """Turn the rows of all ranks into numbers, on rank 0."""
    numbers: dict[str, float] = {}
    for one, rows in zip(metrics, gathered, strict=True):
        present = {name: row for name, row in rows.items() if row is not None}
        numbers |= one.metric.combine(present)
    return numbers
