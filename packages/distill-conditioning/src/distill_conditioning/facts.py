"""What can be told of a data set before torch is imported: for run-file checks and dry runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from attrs import field, frozen
from distill_protocols.errors import DataError

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
class DatasetFacts:
    """What a data set's index, file sizes and metadata tell; no tensor was read.

    Attributes:
        index: None where not even the index can be read.
        negative_prompt: the constants' prompt, None where there are none.
        faults: one line a fault; empty if all files are there and of the right size and shape.
    """

    path: Path
    index: DatasetIndex | None = None
    negative_prompt: str | None = None
    faults: tuple[str, ...] = field(default=(), converter=tuple)

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


def dataset_facts(
    path: str | Path,
    *,
    latent_shape: tuple[int, ...] | None = None,
    text_shape: tuple[int, ...] | None = None,
    image_shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    times: tuple[float, ...] = (),
) -> DatasetFacts:
    """Look at the data set in ``path``: index, files, sizes, headers, shapes.

    Never raises for bad data.

    Args:
        latent_shape: (C, T, H, W) that the model takes; None leaves it unchecked.
        text_shape: (L, D) of the text embeddings that the model takes; None likewise.
        image_shapes: of one row of what the model reads of a first frame, by name.
        times: levels t of a teacher's trajectories that the method reads.
    """
    folder = Path(path)
    try:
        index = read_index(folder)
    except DataError as error:
        hint = f" {_MAKE_TRAJECTORIES}" if times else ""
        return DatasetFacts(path=folder, faults=(f"{error}{hint}",))
    faults = [
        *_file_faults(folder, index),
        *_shape_faults(folder, index, latent_shape, text_shape),
        *_image_faults(folder, index, image_shapes),
        *_trajectory_faults(folder, index, times),
    ]
    prompt = None
    if index.constants is not None:
        try:
            prompt = str(read_metadata(folder / index.constants)["negative_prompt"])
        except KeyError:
            faults.append(f"{folder / index.constants}: names no negative prompt. {REBUILD}")
        except DataError as error:
            faults.append(str(error))
    return DatasetFacts(path=folder, index=index, negative_prompt=prompt, faults=faults)


def _file_faults(folder: Path, index: DatasetIndex) -> list[str]:
    faults = []
    for shard in index.shards:
        file = folder / shard.file
        if not file.is_file():
            faults.append(f"{file}: this shard is in the index, but not in the folder. {REBUILD}")
        elif (size := file.stat().st_size) != shard.bytes:
            faults.append(
                f"{file}: {size} bytes, but the index says {shard.bytes}, so the shard is "
                f"truncated or another one. {REBUILD}"
            )
        else:
            faults += _header_faults(file)
    return faults


def _header_faults(file: Path) -> list[str]:
    try:
        read_metadata(file)
    except DataError as error:
        return [str(error)]
    return []


def _shape_faults(
    folder: Path,
    index: DatasetIndex,
    latent_shape: tuple[int, ...] | None,
    text_shape: tuple[int, ...] | None,
) -> list[str]:
    faults = []
    if latent_shape is not None and index.latent_shape != tuple(latent_shape):
        faults.append(
            f"{folder}: latents are {list(index.latent_shape)} [C, T, H, W], but the model takes "
            f"{list(latent_shape)}. Preprocess clips of the run's size with the run's VAE, or set "
            "frames, height and width of the run to those of the data set."
        )
    text = index.conditions.get("text")
    if text_shape is not None and text != tuple(text_shape):
        faults.append(
            f"{folder}: text embeddings are {list(text) if text else 'absent'} [L, D], but the "
            f"model takes {list(text_shape)}: it was trained to attend the padding too, so another "
            "L gives other clips, and another D does not fit. Set "
            "pipeline_config.max_sequence_length to the data set's L (where the model allows it), "
            "or preprocess with the text encoder and the length of the run's model."
        )
    return faults


def _image_faults(
    folder: Path, index: DatasetIndex, shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    return [
        f"{folder}: {name} of the samples is {list(found) if found else 'absent'}, but the model "
        f"reads {list(shape)} of each clip's first frame. Preprocess the clips with the run's "
        "model and size, and first_frames=True"
        for name, shape in shapes.items()
        if (found := index.conditions.get(name)) != tuple(shape)
    ]


def _trajectory_faults(folder: Path, index: DatasetIndex, times: tuple[float, ...]) -> list[str]:
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
