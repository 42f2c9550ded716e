"""ODE pairs of other codes: a prompt, and a teacher's states from noise to its clip.

``.pt``  {prompt: [1, S, T, C, H, W]}, one file or more; or {"prompts": [...], "latents": [...]}
LMDB     ``latents_shape`` "N S T C H W" ("N T C H W": clips alone), ``latents_<n>_data`` float16,
         ``prompts_<n>_data`` UTF-8
parquet  FastVideo's, see ``distill_media.stored``

States are normalised and fall from noise to the clip, which is the last. Their levels t are
recorded in the parquet alone.

Source: tianweiy/CausVid, causvid/models/wan/generate_ode_pairs.py, causvid/data.py and
causvid/ode_data/create_lmdb_iterative.py; guandeh17/Self-Forcing, utils/lmdb.py.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from attrs import define, evolve, field
from distill_conditioning.format import find_levels
from distill_media import MediaError, MediaItem, TrajectoryReader, items_of_trajectories
from distill_media.items import StoredRow
from distill_protocols import DataError
from torch import Tensor

from distill_preprocess.config import OdePairsConfig

LMDB_FILE = "data.mdb"
_MOST_VALUES = 1 << 32
"""Of one pair: eight states of a minute of 720p have 2^30."""


class PairFile(Protocol):
    """Where pairs are."""

    def items(self) -> Iterator[MediaItem]:
        """List the pairs, in an order that does not change.

        Raises:
            DataError: there is none, or what is there has another layout.
        """
        ...

    def read(self, item: MediaItem) -> Tensor:
        """Read the states [S, C, T, H, W] of a pair, fp32, noise first and the clip last.

        Raises:
            MediaError: the pair is damaged or of another layout.
        """
        ...


def open_pairs(config: OdePairsConfig) -> PairFile:
    """Open a folder of ``.pt`` files, one of them, an LMDB, or FastVideo's parquet.

    Raises:
        DataError: it is none of these.
    """
    path = Path(config.path)
    if path.suffix == ".parquet" or (path.is_dir() and any(path.rglob("*.parquet"))):
        return ParquetPairs(path, config.times)
    database = path / LMDB_FILE if path.is_dir() else path
    if database.suffix == ".mdb" and database.is_file():
        return LmdbPairs(path)
    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    if not files or not all(file.is_file() and file.suffix == ".pt" for file in files):
        raise DataError(
            f"{path}: holds no ODE pairs, which are .pt files, an LMDB ({LMDB_FILE}) or parquet. "
            "Name the folder that CausVid, Self-Forcing or FastVideo has written them to"
        )
    return PtPairs(files)


def _states(value: Tensor) -> Tensor:
    """Bring a stored value to [S, C, T, H, W]: [1, S, T, C, H, W], [S, T, C, H, W], or, of a clip
    alone, [T, C, H, W].

    Raises:
        ValueError: it has other axes.
    """
    shape = list(value.shape)
    if value.ndim == 6 and len(value) == 1:
        value = value[0]
    if value.ndim == 4:
        value = value[None]
    if value.ndim != 5 or value.numel() == 0:
        raise ValueError(f"its states are {shape}, and must be [1, S, T, C, H, W]")
    return value.float().transpose(1, 2)


@define(eq=False)
class PtPairs(PairFile):
    """``.pt`` files. No code of theirs runs: what is more than tensors and plain values is refused.

    Attributes:
        files: in their order; the pairs of the last one stay open.
    """

    files: list[Path]
    _open: tuple[Path, list[tuple[str, Tensor]]] | None = None

    def items(self) -> Iterator[MediaItem]:
        for file in self.files:
            try:
                pairs = self._pairs(file)
            except ValueError as error:
                yield MediaItem(id=file.name, problem=str(error))
                continue
            for row, (prompt, _) in enumerate(pairs):
                yield MediaItem(
                    id=file.name if len(pairs) == 1 else f"{file.name}:{row}",
                    captions=(prompt,),
                    stored=StoredRow(file, 0, row),
                    size=file.stat().st_size,
                )

    def read(self, item: MediaItem) -> Tensor:
        row = _row_of(item)
        try:
            return _states(self._pairs(row.path)[row.row][1])
        except (ValueError, LookupError) as error:
            raise MediaError(item.id, f"{error}. Make the pair again, or remove it") from error

    def _pairs(self, file: Path) -> list[tuple[str, Tensor]]:
        """Load the pairs of a file, unless they are those of the last one.

        Raises:
            ValueError: the file needs code to be read, or holds other things.
        """
        if self._open is None or self._open[0] != file:
            self._open = (file, list(_pairs_of(_load(file))))
        return self._open[1]


def _load(file: Path) -> object:
    try:
        # Only a zip can be mapped; files of before torch 1.6 are none.
        return torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except pickle.UnpicklingError as error:
        raise ValueError(
            "it names code that would have to run, and only tensors and plain values are read"
        ) from error
    except Exception as error:  # a damaged file raises from anywhere
        raise ValueError("it is damaged, or torch.save did not write it") from error


def _pairs_of(content: object) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, and not {{prompt: states}}")
    listed = isinstance(content.get("prompts"), list) and "latents" in content
    pairs = zip(content["prompts"], content["latents"], strict=False) if listed else content.items()
    for prompt, states in pairs:
        if not isinstance(prompt, str) or not isinstance(states, Tensor):
            raise ValueError(
                f"it holds {str(prompt)[:40]!r}: {type(states).__name__}, and not prompt: states"
            )
        yield prompt, states


@define(eq=False)
class LmdbPairs(PairFile):
    """An LMDB, read in place."""

    path: Path
    _shape: tuple[int, ...] = field(init=False)
    _environment: Any = field(init=False)

    def __attrs_post_init__(self) -> None:
        try:
            import lmdb
        except ImportError as error:
            raise DataError(
                f"{self.path}: lmdb, which reads it, is not installed. pip install "
                "'distill-preprocess[lmdb]'"
            ) from error
        try:
            self._environment = lmdb.open(
                str(self.path), subdir=self.path.is_dir(), readonly=True, lock=False,
                readahead=False, meminit=False,
            )  # fmt: skip
            self._shape = tuple(int(size) for size in self._get("latents_shape").split())
        except (lmdb.Error, LookupError, ValueError) as error:
            raise DataError(
                f"{self.path}: is no LMDB of ODE pairs ({error}). Name the one that "
                "create_lmdb_iterative.py has written, or the folder of .pt files"
            ) from error
        sizes = self._shape[1:]
        if len(sizes) not in (4, 5) or min(self._shape) < 1 or math.prod(sizes) > _MOST_VALUES:
            raise DataError(
                f"{self.path}: its latents_shape is {list(self._shape)}, and must be [N, S, T, C, "
                "H, W] of ODE pairs, or [N, T, C, H, W] of clips"
            )

    def items(self) -> Iterator[MediaItem]:
        for row in range(self._shape[0]):
            name = f"{self.path.name}:{row}"
            try:
                prompt = self._get(f"prompts_{row}_data").decode()
            except (LookupError, ValueError) as error:
                yield MediaItem(id=name, problem=f"its prompt cannot be read ({error})")
                continue
            stored = StoredRow(self.path, 0, row)
            yield MediaItem(id=name, captions=(prompt,), stored=stored)

    def read(self, item: MediaItem) -> Tensor:
        row = _row_of(item).row
        try:
            content = self._get(f"latents_{row}_data")
            sizes = self._shape[1:]
            if len(content) != 2 * math.prod(sizes):
                raise ValueError(
                    f"it has {len(content)} bytes, and {list(sizes)} of float16 has "
                    f"{2 * math.prod(sizes)}"
                )
            value = torch.frombuffer(bytearray(content), dtype=torch.float16).reshape(sizes)
            return _states(value)
        except (LookupError, ValueError) as error:
            raise MediaError(item.id, f"{error}. Make the LMDB again") from error

    def _get(self, key: str) -> bytes:
        with self._environment.begin() as transaction:
            value = transaction.get(key.encode())
        if value is None:
            raise LookupError(f"there is no {key}")
        return value


@define(eq=False)
class ParquetPairs(PairFile):
    """FastVideo's parquet, which holds the state after each step of sampling.

    Attributes:
        times: levels of the states that are read, beside the clip.
    """

    path: Path
    times: Sequence[float]
    _reader: TrajectoryReader = field(factory=TrajectoryReader)

    def items(self) -> Iterator[MediaItem]:
        for item, stored in items_of_trajectories(self.path):
            problem = item.problem or self._problem(stored)
            yield item if problem is None else evolve(item, problem=problem)

    def read(self, item: MediaItem) -> Tensor:
        states, stored = self._reader.read(item)
        return torch.from_numpy(states[[*find_levels(self.times, stored), len(states) - 1]])

    def _problem(self, stored: Sequence[float]) -> str | None:
        try:
            find_levels(self.times, stored)
        except DataError as error:
            return f"{error}. Write some of these as times; 0 is the clip and not named"
        return None


def _row_of(item: MediaItem) -> StoredRow:
    if item.problem is not None or item.stored is None:
        raise MediaError(item.id, item.problem or "it is no stored pair")
    return item.stored
