"""FastVideo's parquet files: latents and text embeddings that are encoded already.

A tensor X is three columns: ``X_bytes`` (C order), ``X_shape`` and ``X_dtype``. ``vae_latent`` is
the VAE's posterior mean, not normalised; ``first_frame_latent`` [C, T, H, W] is that of the first
frame and grey ones after it, normalised; ``clip_feature`` [257, 1280] the last but one of CLIP's
hidden states. The dtype column is honoured, whatever it says; FastVideo's own reader takes
everything for float32.

Source: hao-ai-lab/FastVideo, fastvideo/dataset/dataloader/schema.py and
fastvideo/pipelines/preprocess/preprocess_pipeline_i2v.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import define, field, frozen
from distill_protocols import DataError

from distill_media.errors import MediaError
from distill_media.items import MediaItem, StoredRow

LATENTS, STORED_TEXT = "vae_latent", "text_embedding"
AXES = {LATENTS: 4, STORED_TEXT: 2, "first_frame_latent": 4, "clip_feature": 2}
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


def items_of_stored(folder: Path) -> Iterator[MediaItem]:
    """Yield the rows of all parquet files below ``folder``, files by their paths.

    Raises:
        DataError: there is none, or one that is damaged or of another layout.
    """
    files = sorted(folder.rglob("*.parquet")) if folder.is_dir() else [folder]
    if not files or not all(file.is_file() for file in files):
        raise DataError(f"{folder}: there is no .parquet file. Name the folder of FastVideo's")
    for file in files:
        yield from _items_of_file(file, file.relative_to(folder) if folder.is_dir() else file)


def _items_of_file(file: Path, name: Path) -> Iterator[MediaItem]:
    with _opened(file) as parquet:
        columns = set(parquet.schema_arrow.names)
        needed = {
            "id",
            "caption",
            f"{STORED_TEXT}_bytes",
            f"{STORED_TEXT}_shape",
            f"{STORED_TEXT}_dtype",
        }
        if missing := sorted(needed - columns):
            raise DataError(
                f"{file}: lacks the column(s) {', '.join(missing)}, so it is none of FastVideo's "
                "data sets of latents (t2v, i2v or text_only). Name another, or encode the videos"
            )
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group, columns=["id", "caption"]).to_pylist()
            for row, values in enumerate(table):
                caption = values["caption"]
                is_text = isinstance(caption, str)
                yield MediaItem(
                    id=f"{name.as_posix()}/{values['id']}",
                    captions=(caption,) if is_text else (),
                    stored=StoredRow(file, group, row),
                    problem=None if is_text else "its caption is no text. Make the file again",
                )


def _read_group(file: Path, group: int, tensors: Sequence[str]) -> list[Mapping[str, Any]]:
    wanted = [f"{name}_{part}" for name in tensors for part in ("bytes", "shape", "dtype")]
    with _opened(file) as parquet:
        names = set(parquet.schema_arrow.names)
        columns = [name for name in wanted if name in names]
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
