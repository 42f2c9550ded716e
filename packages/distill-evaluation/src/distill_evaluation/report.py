"""The `report` callback: the quality of a run's models, as numbers in a table and as pictures.

Every entry samples the same prompts from the same initial noise; the judge was trained on other
clips than the teacher. Prompts are divided among the ranks of the run, each with all of its clips:
a clip depends on its place alone, and of a rank's clips only features and variances go to rank 0.
So the numbers are those of one process, and all ranks have them.

B clips of a chunk, P prompts, N clips of an entry, D features.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import torch
from distill_media import SheetRow, write_contact_sheet, write_sheet_mp4
from distill_protocols import (
    Callback,
    Condition,
    DataError,
    RowGenerators,
    RunParts,
    RunState,
    SamplerSpec,
    StepRecord,
    StopRequested,
)
from distill_runtime import RowPartition, json_text, replace_file, to_uint8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from distill_evaluation.config import DISTANCES, ReportConfig, ReportEntry, metric_name
from distill_evaluation.distances import DistanceReference, Distances, read_real_latents
from distill_evaluation.judge import Judge
from distill_evaluation.labels import read_prompts
from distill_evaluation.metrics import (
    attribute_accuracy,
    feature_statistics,
    frechet_distance,
    group_variances,
)

CHUNK = 64
"""Most clips sampled at once; bounds memory, and is the batch at which seconds per clip are taken
(less, where a rank has less to do)."""


@attrs.frozen(kw_only=True)
class EntryReport:
    """One row of the report: quality and cost of one entry.

    `within_caption_variance` is that of pixels among clips of one prompt: it falls to 0 where a
    student gives one clip a prompt. `distances` are there if real latents were given.
    `seconds_per_clip` is wall time of denoising alone (no text
    encoder, no VAE), in batches of `CHUNK`: on several ranks, rank 0's for its own clips.
    """

    name: str
    weights: str
    sampler: SamplerSpec
    clips: int
    frechet_distance: float
    accuracy: dict[str, float]
    within_caption_variance: float
    seconds_per_clip: float
    model_calls_per_clip: int
    distances: Distances | None = None

    def metrics(self) -> dict[str, float]:
        """Return its quality by the names of ``ReportConfig.metric_names``."""
        numbers = {
            "fd": self.frechet_distance,
            **self.accuracy,
            "variance": self.within_caption_variance,
        }
        if self.distances is not None:
            numbers |= attrs.asdict(self.distances)
        return {metric_name(self.name, number): value for number, value in numbers.items()}


class ReportCallback(Callback):
    """Writes report.json, contact_sheet.png and clips.mp4 into the output folder, prints a table.
    On several ranks all of them sample, and rank 0 alone writes and prints.

    With ``every_steps`` it also measures during the run and leaves the numbers in ``run.metrics``;
    the run goes on as if nothing had been measured. Put it behind callbacks that move what it
    measures (averages), as the app does.

    Everything it reads (judge, reference, prompts and their labels, roles) is read when the run
    starts, so that a wrong path does not end the run at its very end.

    Raises:
        WeightsError, DataError: the judge, its reference or the prompts are missing or misfit.
        RoleError: an entry names a role that the run has not.
        ConditioningError: an entry is guided, and there is no negative condition.
    """

    name = "report"

    def __init__(self, config: ReportConfig, parts: RunParts) -> None:
        self.config = config
        self.parts = parts
        parts.method.bundle.require_roles({entry.role for entry in config.entries.values()})
        self.judge = Judge.load(config.judge)
        self.reference = feature_statistics(read_reference(Path(config.judge)))
        self.prompts = read_prompts(Path(config.prompts))
        self.labels = self.judge.expected([*self.prompts, *config.sheet_prompts])
        self._check_clips(Path(config.judge))
        if any(self._spec(entry).guided for entry in config.entries.values()):
            parts.conditioning.negative()
        # Encoded now and kept by the provider: a prompt must not fail after days of training.
        for prompts in (self.prompts, config.sheet_prompts):
            parts.conditioning.encode(prompts)
        self._real, self._real_distances = self._read_real(config)
        self._frozen_rows: dict[str, EntryReport] = {}

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        if not self.config.every_steps or step.iteration % self.config.every_steps:
            return
        run.check_finite()
        metrics: dict[str, float] = {}
        for name, entry in self.config.entries.items():
            run.method.stop.poll()  # a report that is left unfinished adds nothing
            if entry.during:
                metrics |= self._row(run, name, entry).metrics()
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
        for name, entry in self.config.entries.items():
            rows.append(self._row(run, name, entry))
            if entry.sheet:
                sheets += self._sheet_rows(run, name, entry)
        run.ranks.run_on_first(lambda: self._show(run, rows, sheets))

    def _show(self, run: RunState, rows: Sequence[EntryReport], sheets: Sequence[SheetRow]) -> None:
        report = {
            "iteration": run.iteration,
            "method": type(self.parts.method).__name__,
            "update_counts": self.parts.method.update_counts,
            "seed": {"training": run.streams.seed, "report": self.config.seed},
            "reference_clips": self.reference.count,
            **self._real_record(),
            "entries": [attrs.asdict(row) for row in rows],
        }
        self._write(run.output_dir, report, sheets)
        text = format_table(rows)
        for tracker in run.trackers:
            tracker.log_text(run.iteration, "report", f"```\n{text}\n```")
        print(f"\n{text}\n\nreport.json, contact_sheet.png, clips.mp4 in {run.output_dir}")

    def _check_clips(self, judge: Path) -> None:
        """Send one clip through decoder and judge, so that sizes that do not fit raise now."""
        adapter = self.parts.adapter
        blank = adapter.decode(torch.zeros((1, *adapter.latent_shape)))
        try:
            width = self.judge.features(blank.cpu()).shape[1]
        except ValueError as error:
            raise DataError(
                f"the judge in {judge} does not take this run's clips: {error}"
            ) from error
        if width != self.reference.mean.numel():
            raise DataError(
                f"{judge}: the reference has {self.reference.mean.numel()} features a clip, the "
                f"judge gives {width}; they belong to different judges. Rebuild the folder."
            )

    def _read_real(self, config: ReportConfig) -> tuple[DistanceReference | None, Distances | None]:
        """Read the real clips; and compare as many of them as an entry has with the others."""
        if config.real_latents is None:
            return None, None
        file, adapter = Path(config.real_latents), self.parts.adapter
        raw = read_real_latents(file)
        kept_out = len(self.prompts) * config.clips_per_prompt
        if raw.shape[1:] != tuple(adapter.latent_shape) or len(raw) <= kept_out:
            raise DataError(
                f"{file} holds latents {list(raw.shape)}; there must be [N, "
                f"{', '.join(map(str, adapter.latent_shape))}] of this run's clips, and more than "
                f"the {kept_out} that an entry has, as so many are kept out. Copy more."
            )
        device = self.parts.method.bundle[next(iter(config.entries.values())).role].call_device
        latents = adapter.normalize_latents(raw.to(device))
        clips, latents = self._decode(latents), latents.cpu()
        try:
            real = DistanceReference.of_clips(clips[:-kept_out], latents[:-kept_out])
        except ValueError as error:
            raise DataError(f"{file}: {error}") from error
        rest = real.features(clips[-kept_out:], latents[-kept_out:])
        return real, real.distances(rest)

    def _real_record(self) -> dict[str, object]:
        if self._real is None or self._real_distances is None:
            return {}
        return {"real": {"clips": self._real.count, **attrs.asdict(self._real_distances)}}

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
        spec, each = self._spec(entry), self.config.clips_per_prompt
        prompts = RowPartition(run.ranks, len(self.prompts))
        rows = [prompt * each + clip for prompt in prompts.own for clip in range(each)]
        cond = self.parts.conditioning.encode(self.prompts)
        with self._weights_of(entry):
            latents, seconds = self._sample(
                entry, spec, cond, rows, clips_per_prompt=each, purpose="report.measure"
            )
        clips = self._decode(latents)
        # Groups by place and not by prompt: RowPartition may repeat the last prompt to fill up a
        # rank, and the copies would otherwise count as one group of twice the clips.
        groups = torch.arange(len(prompts.own)).repeat_interleave(each)
        features = prompts.gather(self.judge.features(clips).unflatten(0, (-1, each)))
        variances = prompts.gather(group_variances(clips, groups))
        compared = None
        if self._real is not None:
            own = self._real.features(clips, latents.cpu())
            compared = prompts.gather(own.unflatten(0, (-1, each)))
        return run.ranks.run_on_first(
            lambda: self._entry_report(
                name, entry, features, variances, compared, seconds / len(rows)
            )
        )

    def _entry_report(
        self,
        name: str,
        entry: ReportEntry,
        features: Tensor | None,
        variances: Tensor | None,
        compared: Tensor | None,
        seconds_per_clip: float,
    ) -> EntryReport:
        """Make the row on rank 0 from all ranks' features [P, N / P, D] and variances [P], and
        those of ``DistanceReference`` if there are any."""
        assert features is not None
        assert variances is not None
        spec, features = self._spec(entry), features.flatten(0, 1)
        return EntryReport(
            name=name,
            weights="ema" if entry.ema else "live",
            sampler=spec,
            clips=len(features),
            frechet_distance=frechet_distance(feature_statistics(features), self.reference),
            accuracy=self._accuracy(features),
            within_caption_variance=float(variances.mean()),
            seconds_per_clip=seconds_per_clip,
            model_calls_per_clip=spec.calls_per_clip,
            distances=None
            if self._real is None or compared is None
            else self._real.distances(compared.flatten(0, 1)),
        )

    def _accuracy(self, features: Tensor) -> dict[str, float]:
        """Compute the accuracy by attribute from the features [N, D] of all clips."""
        each = self.config.clips_per_prompt
        return {
            attribute: attribute_accuracy(
                answer, self.labels[attribute][: len(self.prompts)].repeat_interleave(each)
            )
            for attribute, answer in self.judge.classify_features(features).items()
        }

    def _sheet_rows(self, run: RunState, name: str, entry: ReportEntry) -> list[SheetRow]:
        """Sample one row of the sheet: a list of it on rank 0, elsewhere an empty one."""
        prompts = RowPartition(run.ranks, len(self.config.sheet_prompts))
        cond = self.parts.conditioning.encode(self.config.sheet_prompts)
        with self._weights_of(entry):
            latents, _ = self._sample(
                entry, self._spec(entry), cond, prompts.own, purpose="report.sheet"
            )
        clips = prompts.gather(self._decode(latents))
        return [] if clips is None else [SheetRow(name, to_uint8(clips).numpy())]

    def _sample(
        self,
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
        negative = self.parts.conditioning.negative() if spec.guided else None
        chunks = [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]
        generators = [
            RowGenerators.seeded(self.config.seed, purpose, chunk, device) for chunk in chunks
        ]
        noise = [own.normal(adapter.latent_shape) for own in generators]
        parts = []
        start = time.perf_counter()
        for i, chunk in enumerate(chunks):
            parts.append(
                adapter.sample(
                    entry.role,
                    spec,
                    noise[i],
                    cond[torch.tensor(chunk) // clips_per_prompt],
                    neg_cond=negative,
                    generators=generators[i],
                    poll=self.parts.method.stop.poll,
                )
            )
        latents = torch.cat(parts).cpu()  # waits for the device, so that the clock is right
        return latents.to(device), time.perf_counter() - start

    def _decode(self, latents: Tensor) -> Tensor:
        """Decode latents to clips [N, 3, F, H_px, W_px] on the CPU."""
        clips = []
        for part in latents.split(CHUNK):
            self.parts.method.stop.poll()
            clips.append(self.parts.adapter.decode(part).cpu())
        return torch.cat(clips)

    def _write(
        self, folder: Path, report: Mapping[str, object], sheets: Sequence[SheetRow]
    ) -> None:
        with replace_file(folder / "report.json") as path:
            path.write_text(json_text(report))
        if sheets:
            prompts = self.config.sheet_prompts
            write_contact_sheet(sheets, prompts, folder / "contact_sheet.png")
            write_sheet_mp4(sheets, prompts, folder / "clips.mp4", fps=self.config.fps)


def format_table(rows: Sequence[EntryReport]) -> str:
    """Write the rows as aligned text."""
    attributes = list(rows[0].accuracy)
    compared = DISTANCES if rows[0].distances is not None else ()
    head = [
        "sampled by", "weights", "FD", *compared, *attributes, "variance", "s/clip", "calls/clip",
    ]  # fmt: skip
    lines = [head]
    for row in rows:
        numbers = {} if row.distances is None else attrs.asdict(row.distances)
        lines.append([
            row.name, row.weights, f"{row.frechet_distance:.1f}",
            *(f"{numbers[name]:.2f}" for name in compared),
            *(f"{row.accuracy[a]:.3f}" for a in attributes),
            f"{row.within_caption_variance:.4f}", f"{row.seconds_per_clip:.4f}",
            str(row.model_calls_per_clip),
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def read_reference(judge: Path) -> Tensor:
    """Read features [N, D] of real clips that neither teacher nor judge was trained on."""
    file = judge / "reference.safetensors"
    if not file.is_file():
        raise DataError(
            f"{file} is missing; a Frechet distance is measured against real clips' features. "
            "Write one with the judge's folder, as tools/tiny_wan does."
        )
    try:
        return load_file(file)["features"]
    except (SafetensorError, OSError, RuntimeError, KeyError) as error:
        raise DataError(
            f"{file} is no safetensors file with `features` ({error}); write it anew with the "
            "judge's folder, as tools/tiny_wan does."
        ) from error
