"""Writing a data set in units of work, which processes that were killed can go on with.

What is made is a list of items (clips, pictures, prompts), cut into units. The shards of a unit and
its record are a function of the settings and of its items alone. So whatever units are there stay,
the rest is made by any number of processes, and the end is the same, byte for byte.

::

    preparation.json             the settings
    items-000.json               ids and digests of the items, in their order; one more file for
                                 each time that items were added
    shard-00012.safetensors      samples of unit 12; shard-00012-1 and so on, where it has more
    unit-00012.json              UnitRecord; written last, so that it vouches for the unit's shards
    report.jsonl, index.json     from all records, once they are there
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen
from distill_protocols import WHOLE_ENCODER, Condition, DataError, Fingerprint, OutputError
from distill_protocols.plugins import EMPTY
from distill_runtime import (
    UnreadableFileError,
    as_count,
    as_text,
    claim_folder,
    path_inside,
    read_json,
)

from distill_conditioning.fingerprints import compare_fingerprints, without_whole_encoder
from distill_conditioning.format import (
    CONSTANTS_FILE,
    INDEX_FILE,
    DatasetIndex,
    ShardEntry,
    read_shape,
    split_fingerprint,
)
from distill_conditioning.settings import claim_settings
from distill_conditioning.writing import (
    LatentDtype,
    ShardRows,
    write_constants,
    write_new_text,
    write_text,
)

SETTINGS_FILE = "preparation.json"
REPORT_FILE = "report.jsonl"

_WRITTEN = ("shard-", "unit-", "items-", "preparation", "index", "report", "constants")
"""How the names of the folder's files begin."""
_SHOWN = 5
"""Items that an error names."""


@frozen(kw_only=True)
class ItemKey:
    """What tells an item from others, and from another one in its place."""

    id: str
    digest: str


@frozen(kw_only=True)
class ReportLine:
    """What is to be said of one item.

    Attributes:
        skipped: why no sample was made of it; None: it is in the data set.
        notes: what a person should know.
    """

    id: str
    skipped: str | None = None
    notes: tuple[str, ...] = ()


@frozen(kw_only=True)
class UnitRecord:
    """One finished unit.

    Attributes:
        report: of those of its items that there is something to say of.
        embeddings: hash of the embedding of each caption.
        fingerprint: what computed it.
    """

    shards: tuple[ShardEntry, ...]
    report: tuple[ReportLine, ...]
    embeddings: Mapping[str, str]
    fingerprint: Fingerprint


@frozen(kw_only=True)
class Summary:
    """A finished data set.

    Attributes:
        same_embedding: groups of different captions that the encoder makes the same of.
    """

    index: DatasetIndex
    report: tuple[ReportLine, ...]
    same_embedding: tuple[tuple[str, ...], ...]


class UnitFolder:
    """The folder of a data set that is made in units; ``finish`` writes its index in the end.

    Args:
        folder: made if it does not exist.
        settings: all that decides a sample beside its item, as JSON.
        items: in their order.
        items_per_unit: a process that is killed loses one unit at most.
        add: items that the folder was not begun with become further units.

    Raises:
        DataError: the folder holds something else, or was begun with other settings or items.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        settings: Mapping[str, object],
        items: Sequence[ItemKey],
        items_per_unit: int,
        add: bool = False,
    ) -> None:
        self.folder = Path(folder)
        settings = {**settings, "items_per_unit": items_per_unit}
        foreign = ["shard-*.safetensors", "unit-*.json", INDEX_FILE]
        made = [*self.folder.glob("shard-*.safetensors"), *self.folder.glob("unit-*.json")]
        claim_settings(self.folder, SETTINGS_FILE, settings, foreign=foreign, replace=not made)
        if not made:  # whatever was meant to be made of other items
            write_text(self._items_file(0), _items_text(items))
            for file in sorted(self.folder.glob("items-*.json"))[1:]:
                file.unlink(missing_ok=True)
        order = self._claim_items(items, add=add)
        self._units = [
            tuple(numbers[first : first + items_per_unit])
            for numbers in order
            for first in range(0, len(numbers), items_per_unit)
        ]

    @property
    def units(self) -> int:
        """Number of units of the whole data set."""
        return len(self._units)

    def items_of(self, unit: int) -> tuple[int, ...]:
        """Return the places of a unit's items in ``items``."""
        return self._units[unit]

    def missing(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """List the units of this process that are still to be made."""
        return [n for n in range(rank, self.units, world_size) if self._stored(n) is None]

    def is_complete(self) -> bool:
        """Tell whether the data set is finished: it has an index, and all units are there."""
        return (self.folder / INDEX_FILE).exists() and not self.missing()

    def shard_path(self, unit: int, number: int) -> Path:
        """Return where the ``number``-th shard of a unit is written."""
        end = f"-{number}" if number else ""
        return self.folder / f"shard-{unit:05d}{end}.safetensors"

    def write_shard(self, unit: int, number: int, rows: ShardRows) -> ShardEntry:
        """Write a shard of ``unit``. A former index goes first, because it vouches for all."""
        (self.folder / INDEX_FILE).unlink(missing_ok=True)
        return rows.write(self.shard_path(unit, number))

    def finish_unit(self, unit: int, record: UnitRecord) -> None:
        """Write the record of ``unit``, all of whose shards are written.

        Raises:
            DataError: other parts computed it than other units.
        """
        for other in range(self.units):
            stored = self._stored(other)
            if stored is not None:
                self._check_fingerprint(other, stored.fingerprint, record.fingerprint)
                break
        (self.folder / INDEX_FILE).unlink(missing_ok=True)
        write_text(self._record_file(unit), _to_json(record))

    def finish(
        self,
        *,
        negative: tuple[str, Condition] | None,
        latent_dtype: LatentDtype,
        trajectory_times: Sequence[float] = (),
        more_negatives: Mapping[str, Condition] = EMPTY,
    ) -> Summary | None:
        """Write report, constants and index; None while a unit of another process is missing, or
        where another process is just writing them.

        The last process sees all units.

        Args:
            negative: prompt and condition (one row).
            trajectory_times: levels t of the samples' trajectories, falling.
            more_negatives: by prompt, further ones beside it.

        Raises:
            DataError: there is no sample at all, or units were computed by different parts.
        """
        records = [self._stored(unit) for unit in range(self.units)]
        found = [record for record in records if record is not None]
        if len(found) < self.units:
            return None
        try:
            claim = claim_folder(self.folder, "end")
        except OutputError:
            return None
        with claim:
            return self._finish(
                found, negative, more_negatives, latent_dtype, tuple(trajectory_times)
            )

    def _finish(
        self,
        found: Sequence[UnitRecord],
        negative: tuple[str, Condition] | None,
        more_negatives: Mapping[str, Condition],
        latent_dtype: LatentDtype,
        trajectory_times: tuple[float, ...],
    ) -> Summary:
        # What killed processes left behind. No live one is writing: all units are there, and only
        # one process at a time is here.
        for name in _WRITTEN:
            for part in self.folder.glob(f".{name}*.part*"):
                part.unlink(missing_ok=True)
        fingerprint: dict[str, str] = {}
        for unit, record in enumerate(found):
            self._check_fingerprint(unit, fingerprint, record.fingerprint)
            fingerprint |= record.fingerprint
        report = tuple(line for record in found for line in record.report)
        lines = [json.dumps(_plain_line(line)) + "\n" for line in report]
        write_text(self.folder / REPORT_FILE, "".join(lines))
        shards = tuple(entry for record in found for entry in record.shards)
        if not shards:
            raise DataError(
                f"{self.folder}: no sample could be made of {len(report)} items; "
                f"{REPORT_FILE} in it says why of each. Mend them, and start again in a new folder"
            )
        if negative is not None:
            encoder = fingerprint.get(WHOLE_ENCODER)
            write_constants(self.folder, *negative, encoder=encoder, more=more_negatives)
        index = DatasetIndex(
            latent_dtype=latent_dtype,
            samples=sum(entry.samples for entry in shards),
            shards=shards,
            constants=CONSTANTS_FILE if negative is not None else None,
            trajectory_times=trajectory_times,
            **split_fingerprint(fingerprint),
        )
        write_text(self.folder / INDEX_FILE, index.to_json())
        same = _same_embedding(found)
        return Summary(index=index, report=report, same_embedding=same)

    # -- items --------------------------------------------------------------------------------

    def _claim_items(self, items: Sequence[ItemKey], *, add: bool) -> list[list[int]]:
        """Return, for each file of items, their places in ``items``."""
        places = {item.id: place for place, item in enumerate(items)}
        order, stored = [], self._stored_items()
        for keys in stored:
            order.append(self._places_of(keys, items, places))
        known = {key.id for keys in stored for key in keys}
        new = [item for item in items if item.id not in known]
        if new and stored and not add:
            raise DataError(
                f"{self.folder}: was begun with {len(known)} items, and there are {len(new)} new "
                f"ones ({_some([item.id for item in new])}). Make units of them with add (--add), "
                "or take them out of the sources"
            )
        if new:
            if not write_new_text(self._items_file(len(stored)), _items_text(new)):
                return self._claim_items(items, add=add)  # another process has just written them
            order.append([places[item.id] for item in new])
        return order

    def _stored_items(self) -> list[list[ItemKey]]:
        stored: list[list[ItemKey]] = []
        while (file := self._items_file(len(stored))).exists():
            try:
                rows = read_json(file)
                keys = [ItemKey(id=as_text(name), digest=as_text(d)) for name, d in rows]
            except (UnreadableFileError, TypeError, ValueError) as error:
                raise DataError(
                    f"{file}: cannot be read ({error}), so nobody can tell which units are which. "
                    "Name a new folder."
                ) from error
            stored.append(keys)
        return stored

    def _places_of(
        self, keys: Sequence[ItemKey], items: Sequence[ItemKey], places: Mapping[str, int]
    ) -> list[int]:
        gone = [key.id for key in keys if key.id not in places]
        if gone:
            raise DataError(
                f"{self.folder}: was begun with items that are gone ({_some(gone)}); its samples "
                "would not be those of its sources. Put them back, or name a new folder"
            )
        changed = [key.id for key in keys if items[places[key.id]].digest != key.digest]
        if changed:
            raise DataError(
                f"{self.folder}: items have changed since it was begun ({_some(changed)}): other "
                "captions, or files of another size. Put them back, or name a new folder"
            )
        return [places[key.id] for key in keys]

    def _items_file(self, number: int) -> Path:
        return self.folder / f"items-{number:03d}.json"

    # -- records ------------------------------------------------------------------------------

    def _record_file(self, unit: int) -> Path:
        return self.folder / f"unit-{unit:05d}.json"

    def _stored(self, unit: int) -> UnitRecord | None:
        """Read the record of a unit whose shards are there; None: it is to be made.

        Raises:
            DataError: the record is damaged, which no kill of ours leaves behind.
        """
        file = self._record_file(unit)
        if not file.exists():
            return None
        try:
            return _parse_record(self.folder, file)
        except FileNotFoundError:
            return None
        except (UnreadableFileError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{file}: cannot be read ({error!r}). Delete it, and its unit is made again"
            ) from error

    def _check_fingerprint(self, unit: int, known: Fingerprint, own: Fingerprint) -> None:
        changed = compare_fingerprints(without_whole_encoder(known), own).differences
        if changed:
            listed = "; ".join(f"{d.name} was {d.stored} and is {d.own}" for d in changed)
            raise DataError(
                f"{self.folder}: what computes the data set has changed while it was made (unit "
                f"{unit}: {listed}); no run could tell which samples fit its model. Encode all "
                "with the same parts, into a new folder"
            )


def _items_text(items: Sequence[ItemKey]) -> str:
    return json.dumps([[item.id, item.digest] for item in items]) + "\n"


def _to_json(record: UnitRecord) -> str:
    shards = [
        {"file": s.file, "samples": s.samples, "bytes": s.bytes, "sha256": s.sha256}
        for s in record.shards
    ]
    values = {
        "shards": shards,
        "report": [_plain_line(line) for line in record.report],
        "embeddings": dict(record.embeddings),
        "fingerprint": dict(sorted(record.fingerprint.items())),
    }
    return json.dumps(values, indent=1) + "\n"


def _plain_line(line: ReportLine) -> dict[str, object]:
    if line.skipped is not None:
        return {"id": line.id, "skipped": line.skipped}
    return {"id": line.id, "notes": list(line.notes)}


def _parse_record(folder: Path, file: Path) -> UnitRecord:
    values = read_json(file)
    return UnitRecord(
        shards=tuple(_parse_shard(folder, file, **shard) for shard in values["shards"]),
        report=tuple(
            ReportLine(
                id=as_text(line["id"]),
                skipped=None if "skipped" not in line else as_text(line["skipped"]),
                notes=tuple(map(as_text, line.get("notes", ()))),
            )
            for line in values["report"]
        ),
        embeddings={as_text(k): as_text(v) for k, v in values["embeddings"].items()},
        fingerprint={as_text(k): as_text(v) for k, v in values["fingerprint"].items()},
    )


def _parse_shard(
    folder: Path, record: Path, *, file: Any, samples: Any, bytes: Any, sha256: Any
) -> ShardEntry:
    """Raises: FileNotFoundError where the shard is not as it was written."""
    path = path_inside(folder, file, record)
    if not path.is_file() or path.stat().st_size != as_count(bytes):
        raise FileNotFoundError(path)
    return ShardEntry(
        file=as_text(file),
        samples=as_count(samples),
        bytes=bytes,
        sha256=as_text(sha256),
        shape=read_shape(path),
    )


def _same_embedding(records: Sequence[UnitRecord]) -> tuple[tuple[str, ...], ...]:
    groups: dict[str, dict[str, None]] = {}
    for record in records:
        for caption, digest in record.embeddings.items():
            groups.setdefault(digest, {})[caption] = None
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
