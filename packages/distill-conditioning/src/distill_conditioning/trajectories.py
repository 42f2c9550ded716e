"""Writing a data set of sampled clips, which a process that was killed can go on with.

Each shard is a function of the settings and of its number alone. So whatever shards are there stay,
the rest is made, by any number of processes, and the end is the same, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from distill_protocols import WHOLE_ENCODER, Condition, Fingerprint
from torch import Tensor

from distill_conditioning.format import (
    CONSTANTS_FILE,
    INDEX_FILE,
    TRAJECTORY,
    DatasetIndex,
    read_index,
    read_metadata,
    read_texts,
    shard_file,
    split_fingerprint,
)
from distill_conditioning.settings import claim_settings
from distill_conditioning.writing import (
    DTYPES,
    LatentDtype,
    ShardRows,
    check_finite,
    shard_entry,
    write_constants,
    write_text,
)

SETTINGS_FILE = "trajectories.json"


class TrajectoryFolder:
    """The folder of a trajectory data set; ``finish`` writes its index once all shards are there.

    Shard n holds the samples ``n * samples_per_shard`` and on. With more ``samples`` than the
    folder was made with it is extended: a last shard that was not full is made again.

    Args:
        folder: made if it does not exist.
        settings: all that decides a sample, as JSON; the number of samples excepted.
        times: levels t of each sample's trajectory, falling.
        samples: number of samples of the whole data set.
        samples_per_shard: a process that is killed loses one shard at most.
        ids: returns the id of a sample by its number.
        dtype: as stored.

    Raises:
        DataError: the folder holds something else, or was made with other settings.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        settings: Mapping[str, object],
        times: Sequence[float],
        samples: int,
        samples_per_shard: int,
        ids: Callable[[int], str],
        dtype: LatentDtype,
    ) -> None:
        self.folder = Path(folder)
        self._times = tuple(times)
        self._samples = samples
        self._per_shard = samples_per_shard
        self._ids = ids
        self._dtype: LatentDtype = dtype
        foreign = ["shard-*.safetensors", INDEX_FILE]
        claim_settings(self.folder, SETTINGS_FILE, settings, foreign=foreign)

    @property
    def shards(self) -> int:
        """Number of shards of the whole data set."""
        return -(-self._samples // self._per_shard)

    def span(self, shard: int) -> range:
        """Return the numbers of the samples of ``shard``."""
        first = shard * self._per_shard
        return range(first, min(first + self._per_shard, self._samples))

    def missing(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """List the shards of this process that are still to be made."""
        return [n for n in range(rank, self.shards, world_size) if self._stored_samples(n) is None]

    def complete(self) -> bool:
        """Tell whether the data set is finished: it has an index, and at least as many samples."""
        if not (self.folder / INDEX_FILE).exists():
            return False
        return read_index(self.folder).samples >= self._samples

    def add(
        self,
        rows: ShardRows,
        numbers: Sequence[int],
        captions: Sequence[str],
        condition: Condition,
        latents: Tensor,
        trajectory: Tensor,
    ) -> None:
        """Add B samples to ``rows``, as they will be stored.

        Args:
            latents: [B, C, T, H, W], raw, where the trajectories end.
            trajectory: [B, K, C, T, H, W], normalised, at ``times``.

        Raises:
            DataError: a value that is not finite, also after the cast to the stored type.
        """
        ids = [self._ids(number) for number in numbers]
        stored = [v.detach().to("cpu", DTYPES[self._dtype]) for v in (latents, trajectory)]
        for what, value in zip(("latents", "trajectories"), stored, strict=True):
            check_finite(ids, value, what)
        for row, (sample, caption) in enumerate(zip(ids, captions, strict=True)):
            columns = {"latents": stored[0][row], TRAJECTORY: stored[1][row]}
            rows.add(sample, caption, condition[row : row + 1], columns)

    def write(self, shard: int, rows: ShardRows) -> None:
        """Write ``shard``. A former index goes first, because it vouches for all shards."""
        (self.folder / INDEX_FILE).unlink(missing_ok=True)
        rows.write(self.folder / shard_file(shard))

    def finish(
        self, *, negative: tuple[str, Condition] | None, fingerprint: Fingerprint
    ) -> DatasetIndex | None:
        """Write constants and index; None while a shard of another process is missing.

        The last process sees all shards. Two that see them both write the same bytes.

        Args:
            negative: prompt and condition (one row).
            fingerprint: of what computed the data set that captions and conditions are from.
        """
        stored = [self._stored_samples(shard) for shard in range(self.shards)]
        counts = [count for count in stored if count is not None]
        if len(counts) < self.shards:
            return None
        # What killed processes left behind. No live one is writing: all shards are there.
        for part in self.folder.glob(".shard-*.part*"):
            part.unlink(missing_ok=True)
        if negative is not None:
            encoder = fingerprint.get(WHOLE_ENCODER)
            write_constants(self.folder, *negative, encoder=encoder)
        files = [self.folder / shard_file(shard) for shard in range(self.shards)]
        index = DatasetIndex(
            latent_dtype=self._dtype,
            samples=sum(counts),
            shards=tuple(map(shard_entry, files, counts)),
            constants=CONSTANTS_FILE if negative is not None else None,
            trajectory_times=self._times,
            **split_fingerprint(fingerprint),
        )
        write_text(self.folder / INDEX_FILE, index.to_json())
        return index

    def _stored_samples(self, shard: int) -> int | None:
        """Return the number of samples of a shard that is complete; None: it is to be made.

        Raises:
            DataError: the file is damaged, which no kill of ours leaves behind.
        """
        file = self.folder / shard_file(shard)
        if not file.exists():
            return None
        ids = read_texts(file, read_metadata(file), "ids")
        return len(ids) if len(ids) >= len(self.span(shard)) else None
