"""What a data set holds and what is wrong with it, without torch: for run-file checks and plans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from attrs import field, frozen
from distill_protocols import DataError, Fingerprint

from distill_conditioning.buckets import DataSource
from distill_conditioning.config import DataConfig
from distill_conditioning.fingerprints import compare_fingerprints
from distill_conditioning.format import (
    REBUILD,
    DatasetIndex,
    LatentSize,
    SampleShape,
    find_levels,
    read_index,
    read_metadata,
    read_negative_prompt,
    read_texts,
)

_MAKE_TRAJECTORIES = (
    "The method is trained on a teacher's stored trajectories; make them with apps/trajectories "
    "--config FILE.yaml (configs/tiny/trajectories.yaml is one)."
)
_MAKE_LATENTS = (
    "The method is trained on latents of clips, and makes none itself. Preprocess clips with their "
    "captions, or choose a method or options that need no data but captions (dmd2 with rollout: "
    "simulate, self_forcing, teacher_only with input: student, all without a discriminator)."
)


@frozen(kw_only=True)
class DatasetInfo:
    """What the index, file sizes and headers of a data set say; no tensor was read.

    Attributes:
        index: None where not even the index can be read.
        negative_prompt: the constants' prompt, None where there are none.
        problems: one line a problem; empty if all files are there and of the right size and shape,
            and nothing else computed them than computes in the run.
        notes: what could not be compared, or was accepted; one line each.
    """

    path: Path
    index: DatasetIndex | None = None
    negative_prompt: str | None = None
    problems: tuple[str, ...] = field(default=(), converter=tuple)
    notes: tuple[str, ...] = field(default=(), converter=tuple)

    @property
    def has_negative(self) -> bool:
        """Whether the data set has a negative condition of its own."""
        return self.negative_prompt is not None

    @property
    def samples(self) -> int:
        """Number of samples in all shards; 0 without an index."""
        return self.index.samples if self.index else 0

    @property
    def shards(self) -> int:
        """Number of shards; 0 without an index."""
        return len(self.index.shards) if self.index else 0

    @property
    def shapes(self) -> tuple[SampleShape, ...]:
        """The shapes of samples; none without an index."""
        return self.index.shapes if self.index else ()


@frozen(kw_only=True)
class DataInfo:
    """The summary of all data sets of a run.

    Attributes:
        config: which they are.
        sets: of each, in their order.
    """

    config: DataConfig
    sets: tuple[DatasetInfo, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """Those of all data sets, and what keeps them from being mixed."""
        own = [problem for info in self.sets for problem in info.problems]
        kinds = {
            (index.has_latents, frozenset(index.shapes[0].conditions))
            for index in (info.index for info in self.sets)
            if index is not None
        }
        if not own and len(kinds) > 1:
            listed = "; ".join(f"{info.path}: {info.shapes[0]}" for info in self.sets)
            own.append(
                f"the data sets hold different things ({listed}); all must have latents or none, "
                "and the same conditions, to be read by one model. Preprocess them alike"
            )
        return tuple(own)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes to log once; one line each."""
        return tuple(note for info in self.sets for note in info.notes)

    @property
    def samples(self) -> int:
        """Number of samples in all of them."""
        return sum(info.samples for info in self.sets)

    @property
    def negative_prompts(self) -> tuple[str, ...]:
        """The different prompts of their negative conditions."""
        prompts = (info.negative_prompt for info in self.sets)
        return tuple(dict.fromkeys(prompt for prompt in prompts if prompt is not None))

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The data sets, if they have no problems."""
        return tuple(
            DataSource(name=name, path=info.path, index=info.index, weight=one.weight)
            for name, one, info in zip(
                self.config.names, self.config.all_sets, self.sets, strict=True
            )
            if info.index is not None
        )


def data_info(
    config: DataConfig,
    *,
    shapes: Sequence[SampleShape] = (),
    needs_latents: bool = False,
    times: tuple[float, ...] = (),
    fingerprint: Fingerprint | None = None,
) -> DataInfo:
    """Check all data sets of a run; see ``dataset_info``."""
    return DataInfo(
        config=config,
        sets=tuple(
            dataset_info(
                one.path,
                shapes=shapes,
                needs_latents=needs_latents,
                times=times,
                fingerprint=fingerprint,
                accept=config.accept,
            )
            for one in config.all_sets
        ),
    )


def dataset_info(
    path: str | Path,
    *,
    shapes: Sequence[SampleShape] = (),
    needs_latents: bool = False,
    times: tuple[float, ...] = (),
    fingerprint: Fingerprint | None = None,
    accept: Iterable[str] = (),
) -> DatasetInfo:
    """Check the data set in ``path``: index, files, sizes, headers, shapes, what computed it.

    It never raises for bad data; what is wrong is in ``DatasetInfo.problems``.

    Args:
        shapes: those of samples that the model takes: latents (None: not known), and every
            condition tensor that it cannot do without. Empty leaves them unchecked.
        needs_latents: whether captions alone are too little.
        times: levels t of a teacher's trajectories that the method reads.
        fingerprint: of the run's VAE and encoders; None leaves them uncompared.
        accept: entries of it that may differ (see ``compare_fingerprints``).
    """
    folder = Path(path)
    try:
        index = read_index(folder)
    except DataError as error:
        hint = f" {_MAKE_TRAJECTORIES}" if times else ""
        return DatasetInfo(path=folder, problems=(f"{error}{hint}",))
    problems = [
        *_file_problems(folder, index),
        *_latent_problems(folder, index, shapes, needs_latents=needs_latents),
        *_condition_problems(folder, index, shapes),
        *_trajectory_problems(folder, index, times),
    ]
    prompt = None
    if index.constants is not None:
        try:
            file = folder / index.constants
            prompt = read_negative_prompt(file, read_metadata(file))
        except DataError as error:
            problems.append(str(error))
    notes: list[str] = []
    if fingerprint is not None:
        compared = compare_fingerprints(index.computed_by, fingerprint, accept)
        problems += compared.problems(str(folder))
        notes += compared.notes(str(folder))
    return DatasetInfo(
        path=folder, index=index, negative_prompt=prompt, problems=problems, notes=notes
    )


def _file_problems(folder: Path, index: DatasetIndex) -> list[str]:
    problems = []
    for shard in index.shards:
        file = folder / shard.file
        if not file.is_file():
            problems.append(f"{file}: this shard is in the index, but not in the folder. {REBUILD}")
        elif (size := file.stat().st_size) != shard.bytes:
            problems.append(
                f"{file}: {size} bytes, but the index states {shard.bytes}, so the shard is "
                f"truncated or another one. {REBUILD}"
            )
        else:
            try:
                ids = read_texts(file, read_metadata(file), "ids")
                if len(ids) != shard.samples:
                    problems.append(
                        f"{file}: holds {len(ids)} samples, but the index states {shard.samples}. "
                        f"{REBUILD}"
                    )
            except DataError as error:
                problems.append(str(error))
    return problems


def _latent_problems(
    folder: Path, index: DatasetIndex, shapes: Sequence[SampleShape], *, needs_latents: bool
) -> list[str]:
    if not index.has_latents:
        return [f"{folder}: holds captions alone. {_MAKE_LATENTS}"] if needs_latents else []
    known = [list(shape.latents) for shape in shapes if shape.latents is not None]
    parts = {shape.latents: shape.parts for shape in shapes}
    return [
        f"{folder}: latents are {_list_parts(shape.parts)}, but clips of this run have the parts "
        f"{_list_parts(wanted)}, and the method reads all of them. Use a data set that has them, a "
        "method that makes its own clips (dmd2), or the model without the other parts."
        for shape in index.shapes
        if needs_latents and (wanted := parts.get(shape.latents)) and wanted != shape.parts
    ] + [
        f"{folder}: latents are {list(shape.latents)} [C, T, H, W], but the model takes "
        f"{' or '.join(map(str, known))}. Preprocess clips of the run's size with the run's VAE, "
        "or run with the frames, height and width of the data set."
        for shape in index.shapes
        if known and shape.latents is not None and list(shape.latents) not in known
    ]


def _list_parts(parts: Mapping[str, LatentSize]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in parts.items()) or "one tensor"


def _condition_problems(
    folder: Path, index: DatasetIndex, shapes: Sequence[SampleShape]
) -> list[str]:
    problems = []
    for stored in index.shapes:
        of_size = [one for one in shapes if _are_of_one_size(one, stored)]
        needed = of_size[0].conditions if of_size else {}  # another size is a problem already
        for name, shape in needed.items():
            own = stored.conditions.get(name)
            if own != tuple(shape):
                problems.append(
                    f"{folder}: the condition tensor {name!r} is "
                    f"{'absent' if own is None else list(own)} in each sample, but the model "
                    f"reads {list(shape)}; with another shape it fails, or gives other clips than "
                    "it was trained to. Preprocess the clips with the encoders, lengths and sizes "
                    "of the run's model (first_frames=True stores those of images), or give the "
                    "run's model the options that the data set was made with."
                )
    return list(dict.fromkeys(problems))


def _are_of_one_size(model: SampleShape, stored: SampleShape) -> bool:
    return None in (model.latents, stored.latents) or model.latents == stored.latents


def _trajectory_problems(folder: Path, index: DatasetIndex, times: tuple[float, ...]) -> list[str]:
    if not times:
        return []
    if not index.trajectory_times:
        return [f"{folder}: holds latents, but no trajectories. {_MAKE_TRAJECTORIES}"]
    try:
        find_levels(times, index.trajectory_times)
    except DataError as error:
        wanted = ", ".join(f"{t:g}" for t in times)
        return [
            f"{folder}: {error}, and the student is sampled at {wanted}: it is trained at the "
            "levels that it will be called with. Sample the student at stored levels, or make "
            "trajectories that keep its own."
        ]
    return []
