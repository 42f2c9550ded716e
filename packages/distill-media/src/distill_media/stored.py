"""FastVideo's parquet files: latents and text embeddings that are encoded already, or trajectories.

A tensor X is three columns: ``X_bytes`` (C order), ``X_shape`` and ``X_dtype``. ``vae_latent`` is
the VAE's posterior mean, not normalised; ``first_frame_latent`` [C, T, H, W] is that of the first
frame and grey ones after it, normalised; ``clip_feature`` [257, 1280] the last but one of CLIP's
hidden states. The dtype column is honoured, whatever it says; FastVideo's own reader takes
everything for float32.

``trajectory_latents`` [1, S, C, T, H, W] are normalised states, ``trajectory_timesteps`` [S] the t
that each of S steps began at. A state is stored after its step, so it is at the t of the next one,
and the last state is the clip; the noise that sampling began with is not there.

Source: hao-ai-lab/FastVideo, fastvideo/dataset/dataloader/schema.py,
fastvideo/pipelines/preprocess/preprocess_pipeline_i2v.py and _ode_trajectory.py, and
fastvideo/pipelines/stages/denoising.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import define, evolve, field, frozen
from distill_protocols import DataError

from distill_media.errors import MediaError
from distill_media.items import MediaItem, StoredRow

LATENTS, STORED_TEXT = "vae_latent", "text_embedding"
STATES, STEPS = "trajectory_latents", "trajectory_timesteps"
AXES = {
    LATENTS: 4, STORED_TEXT: 2, "first_frame_latent": 4, "clip_feature": 2, STATES: 5, STEPS: 1,
}  # fmt: skip
"""Of the tensors that are known, by name."""
_DTYPES = ("float16", "float32", "float64", "bfloat16")
_MOST_VALUES = 1 << 30


@frozen(eq=False)
class StoredSample:
    """One row, in fp32.

    Attributes:
        latents: [C, T, H, W]; None where there are captions alone.
        conditions: tensors that were asked for, by name; the text is [L, D].
    """

    latents: np.ndarray | None
    conditions: Mapping[str, np.ndarray]


@define(eq=False)
class StoredReader:
    """Reads rows; the last group of rows stays in memory, as rows are read in their order.

    Attributes:
        conditions: names of the tensors that are read beside latents.
    """

    conditions: Sequence[str] = (STORED_TEXT,)
    _group: tuple[Path, int] | None = None
    _rows: list[Mapping[str, Any]] = field(factory=list)

    def read(self, item: MediaItem) -> StoredSample:
        """Read the tensors of ``item``.

        Raises:
            MediaError: the file or the row is damaged.
        """
        row = item.stored
        if row is None:
            raise MediaError(item.id, "it is no row of a parquet file of latents")
        if item.problem is not None:
            raise MediaError(item.id, item.problem)
        try:
            if self._group != (row.path, row.group):
                self._rows = _read_group(row.path, row.group, [LATENTS, *self.conditions])
                self._group = (row.path, row.group)
            values = self._rows[row.row]
            has_latents = f"{LATENTS}_bytes" in values
            return StoredSample(
                latents=_tensor(values, LATENTS) if has_latents else None,
                conditions={name: _tensor(values, name) for name in self.conditions},
            )
        except (OSError, ValueError, LookupError, TypeError) as error:
            reason = f"its row in {row.path.name} cannot be read ({error})"
            raise MediaError(item.id, f"{reason}. Make the parquet file again") from error


@define(eq=False)
class TrajectoryReader:
    """Reads trajectories row by row, in their order: one may have hundreds of megabytes."""

    _next: StoredRow | None = None
    _rows: Iterator[Mapping[str, Any]] = field(factory=lambda: iter(()))

    def read(self, item: MediaItem) -> tuple[np.ndarray, tuple[float, ...]]:
        """Read the states [S, C, T, H, W] of ``item`` in fp32, and the t of each.

        Raises:
            MediaError: the file or the row is damaged.
        """
        row = item.stored
        if row is None or item.problem is not None:
            raise MediaError(item.id, item.problem or "it is no row of a parquet file")
        try:
            first = evolve(row, row=0)
            if self._next is None or evolve(self._next, row=0) != first or self._next.row > row.row:
                self._rows, self._next = _stream_group(row.path, row.group, [STATES, STEPS]), first
            values = next(itertools.islice(self._rows, row.row - self._next.row, None))
            self._next = evolve(row, row=row.row + 1)
            states, times = _tensor(values, STATES), _times_of_states(values)
            if len(states) != len(times):
                raise ValueError(f"it has {len(states)} states and {len(times)} timesteps")
        except (OSError, ValueError, LookupError, TypeError, StopIteration) as error:
            self._next = None
            reason = f"its row in {row.path.name} cannot be read ({error})"
            raise MediaError(item.id, f"{reason}. Make the parquet file again") from error
        return states, times


def _times_of_states(values: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the t of each stored state: that of the next step, and 0 of the clip."""
    began = [round(float(time), 6) for time in _tensor(values, STEPS)]
    return (*began[1:], 0.0)


def items_of_stored(folder: Path) -> Iterator[MediaItem]:
    """Yield the rows of all parquet files below ``folder``, files by their paths.

    Raises:
        DataError: there is none, or one that is damaged or of another layout.
    """
    for file, name in _parquet_files(folder):
        with _opened(file) as parquet:
            if f"{STATES}_bytes" in parquet.schema_arrow.names:
                raise DataError(
                    f"{file}: holds trajectories, which become data for kd by ode_pairs. Write "
                    "ode_pairs: {path: ...} in place of sources"
                )
            columns = _tensor_columns([STORED_TEXT])
            _check_columns(file, parquet, ["id", "caption", *columns], "t2v, i2v or text_only")
            for row, values in _rows_of(file, parquet, ["id", "caption"]):
                yield _item_of(row, values, name)


def items_of_trajectories(folder: Path) -> Iterator[tuple[MediaItem, tuple[float, ...]]]:
    """Yield the rows of all parquet files of trajectories below ``folder``, each with the t of its
    states; without any where that cannot be read.

    Raises:
        DataError: there is none, or one that is damaged or of another layout.
    """
    for file, name in _parquet_files(folder):
        with _opened(file) as parquet:
            columns = ["id", "caption", *_tensor_columns([STEPS])]
            needed = [*columns, *_tensor_columns([STATES])]
            _check_columns(file, parquet, needed, "ODE trajectories")
            for row, values in _rows_of(file, parquet, columns):
                item = _item_of(row, values, name)
                try:
                    yield item, _times_of_states(values)
                except (ValueError, TypeError) as error:
                    yield evolve(item, problem=f"{error}. Make the parquet file again"), ()


def _parquet_files(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield each file, and how ids begin that are of it."""
    files = sorted(folder.rglob("*.parquet")) if folder.is_dir() else [folder]
    if not files or not all(file.is_file() for file in files):
        raise DataError(f"{folder}: there is no .parquet file. Name the folder of FastVideo's")
    for file in files:
        yield file, file.relative_to(folder) if folder.is_dir() else file


def _check_columns(file: Path, parquet: Any, needed: Sequence[str], kinds: str) -> None:
    if missing := sorted(set(needed) - set(parquet.schema_arrow.names)):
        raise DataError(
            f"{file}: lacks the column(s) {', '.join(missing)}, so it is none of FastVideo's "
            f"data sets ({kinds}). Name another, or encode the videos"
        )


def _rows_of(
    file: Path, parquet: Any, columns: Sequence[str]
) -> Iterator[tuple[StoredRow, Mapping[str, Any]]]:
    for group in range(parquet.num_row_groups):
        table = parquet.read_row_group(group, columns=columns).to_pylist()
        for row, values in enumerate(table):
            yield StoredRow(file, group, row), values


def _item_of(row: StoredRow, values: Mapping[str, Any], name: Path) -> MediaItem:
    caption = values["caption"]
    is_text = isinstance(caption, str)
    return MediaItem(
        id=f"{name.as_posix()}/{values['id']}",
        captions=(caption,) if is_text else (),
        stored=row,
        problem=None if is_text else "its caption is no text. Make the file again",
    )


def _tensor_columns(tensors: Sequence[str]) -> list[str]:
    return [f"{name}_{part}" for name in tensors for part in ("bytes", "shape", "dtype")]


def _stream_group(file: Path, group: int, tensors: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    with _opened(file) as parquet:
        columns = _tensor_columns(tensors)
        for batch in parquet.iter_batches(batch_size=1, row_groups=[group], columns=columns):
            yield from batch.to_pylist()


def _read_group(file: Path, group: int, tensors: Sequence[str]) -> list[Mapping[str, Any]]:
    with _opened(file) as parquet:
        names = set(parquet.schema_arrow.names)
        columns = [name for name in _tensor_columns(tensors) if name in names]
        return parquet.read_row_group(group, columns=columns).to_pylist()


def _opened(file: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{file}: pyarrow, which reads parquet, is not installed. pip install "
            "'distill-media[parquet]'"
        ) from error
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{file}: is no parquet file ({str(error)[:200]}). Make it again"
        ) from error


def _tensor(values: Mapping[str, Any], name: str) -> np.ndarray:
    if not values.get(f"{name}_shape"):
        raise ValueError(f"it holds no {name}, which the models read")
    axes = AXES[name]
    content, kind = values[f"{name}_bytes"], values[f"{name}_dtype"]
    shape = [int(size) for size in values[f"{name}_shape"]]
    if len(shape) == axes + 1 and shape[0] == 1:  # a batch of one
        shape = shape[1:]
    kind = str(kind).removeprefix("torch.")
    if kind not in _DTYPES:
        raise ValueError(f"{name}_dtype is {kind!r}, and none of {', '.join(_DTYPES)}")
    count = math.prod(shape)
    if len(shape) != axes or min(shape) < 1 or count > _MOST_VALUES:
        raise ValueError(f"{name}_shape is {shape}, and must be {axes} sizes")
    size = 2 if kind == "bfloat16" else np.dtype(kind).itemsize
    if len(content) != count * size:
        raise ValueError(f"{name} has {len(content)} bytes, and {shape} {kind} is {count * size}")
    if kind == "bfloat16":  # the upper half of a float32
        return (
            (np.frombuffer(content, np.uint16).astype(np.uint32) << 16).view("<f4").reshape(shape)
        )
    return np.frombuffer(content, np.dtype(kind)).astype(np.float32).reshape(shape)
