"""What can be told of a data set before torch is imported: for run-file checks and dry runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from attrs import field, frozen
from distill_protocols import DataError

from distill_conditioning.index import (
    REBUILD,
    DatasetIndex,
    places_of,
    read_index,
    read_metadata,
)

_MAKE_TRAJECTORIES = (
    "The method learns from a teacher's stored trajectories; make them with apps/trajectories "
    "--config FILE.yaml (configs/tiny/trajectories.yaml is one)."
)


@frozen(kw_only=True)
class DatasetInfo:
    """What a data set's index, file sizes and metadata tell; no tensor was read.

    Attributes:
        index: None where not even the index can be read.
        negative_prompt: the constants' prompt, None where there are none.
        problems: one line a problem; empty if all files are there and of the right size and shape.
    """

    path: Path
    index: DatasetIndex | None = None
    negative_prompt: str | None = None
    problems: tuple[str, ...] = field(default=(), converter=tuple)

    @property
    def has_negative(self) -> bool:
        """Whether the data set brings a negative condition of its own."""
        return self.negative_prompt is not None

    @property
    def samples(self) -> int:
        """In all shards together; 0 without an index."""
        return self.index.samples if self.index else 0

    @property
    def shards(self) -> int:
        """How many there are; 0 without an index."""
        return len(self.index.shards) if self.index else 0

    @property
    def latent_shape(self) -> tuple[int, int, int, int] | None:
        """(C, T, H, W) of a sample."""
        return self.index.latent_shape if self.index else None


def dataset_info(
    path: str | Path,
    *,
    latent_shape: tuple[int, ...] | None = None,
    condition_shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    times: tuple[float, ...] = (),
) -> DatasetInfo:
    """Look at the data set in ``path``: index, files, sizes, headers, shapes.

    Never raises for bad data.

    Args:
        latent_shape: (C, T, H, W) that the model takes; None leaves it unchecked.
        condition_shapes: of one row of every condition tensor that the model cannot do without,
            by name.
        times: levels t of a teacher's trajectories that the method reads.
    """
    folder = Path(path)
    try:
        index = read_index(folder)
    except DataError as error:
        hint = f" {_MAKE_TRAJECTORIES}" if times else ""
        return DatasetInfo(path=folder, problems=(f"{error}{hint}",))
    problems = [
        *_file_problems(folder, index),
        *_latent_problems(folder, index, latent_shape),
        *_condition_problems(folder, index, condition_shapes),
        *_trajectory_problems(folder, index, times),
    ]
    prompt = None
    if index.constants is not None:
        try:
            prompt = str(read_metadata(folder / index.constants)["negative_prompt"])
        except KeyError:
            problems.append(f"{folder / index.constants}: names no negative prompt. {REBUILD}")
        except DataError as error:
            problems.append(str(error))
    return DatasetInfo(path=folder, index=index, negative_prompt=prompt, problems=problems)


def _file_problems(folder: Path, index: DatasetIndex) -> list[str]:
    problems = []
    for shard in index.shards:
        file = folder / shard.file
        if not file.is_file():
            problems.append(f"{file}: this shard is in the index, but not in the folder. {REBUILD}")
        elif (size := file.stat().st_size) != shard.bytes:
            problems.append(
                f"{file}: {size} bytes, but the index says {shard.bytes}, so the shard is "
                f"truncated or another one. {REBUILD}"
            )
        else:
            problems += _header_problems(file)
    return problems


def _header_problems(file: Path) -> list[str]:
    try:
        read_metadata(file)
    except DataError as error:
        return [str(error)]
    return []


def _latent_problems(
    folder: Path, index: DatasetIndex, latent_shape: tuple[int, ...] | None
) -> list[str]:
    if latent_shape is None or index.latent_shape == tuple(latent_shape):
        return []
    return [
        f"{folder}: latents are {list(index.latent_shape)} [C, T, H, W], but the model takes "
        f"{list(latent_shape)}. Preprocess clips of the run's size with the run's VAE, or set "
        "frames, height and width of the run to those of the data set."
    ]


def _condition_problems(
    folder: Path, index: DatasetIndex, shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    return [
        _condition_problem(folder, name, index.conditions.get(name), shape)
        for name, shape in shapes.items()
        if index.conditions.get(name) != tuple(shape)
    ]


def _condition_problem(
    folder: Path, name: str, found: tuple[int, ...] | None, shape: tuple[int, ...]
) -> str:
    if name == "text":
        return (
            f"{folder}: text embeddings are {list(found) if found else 'absent'} [L, D], but the "
            f"model takes {list(shape)}: it was trained to attend the padding too, so another "
            "L gives other clips, and another D does not fit. Set "
            "pipeline_config.max_sequence_length to the data set's L (where the model allows it), "
            "or preprocess with the text encoder and the length of the run's model."
        )
    return (
        f"{folder}: {name} of the samples is {list(found) if found else 'absent'}, but the model "
        f"reads {list(shape)} of each clip's first frame. Preprocess the clips with the run's "
        "model and size, and first_frames=True"
        if name.startswith("image")
        else f"{folder}: {name} of the samples is {list(found) if found else 'absent'}, but the "
        f"model reads {list(shape)}. Preprocess the clips with the run's model"
    )


def _trajectory_problems(folder: Path, index: DatasetIndex, times: tuple[float, ...]) -> list[str]:
    if not times:
        return []
    if not index.trajectory_times:
        return [f"{folder}: holds latents, but no trajectories. {_MAKE_TRAJECTORIES}"]
    try:
        places_of(times, index.trajectory_times)
    except DataError as error:
        wanted = ", ".join(f"{t:g}" for t in times)
        return [
            f"{folder}: {error}, and the student is sampled at {wanted}: it learns at the levels "
            "that it will be called with. Give method_config.student_sampler these timesteps, or "
            "make trajectories that keep its own (trajectories.keep_times)."
        ]
    return []
