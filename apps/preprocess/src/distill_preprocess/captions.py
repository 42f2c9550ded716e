"""The captions of all units, encoded before the first clip is.

A text encoder of 11 GB and a VAE with a clip in it are never in memory together: the captions of
each unit wait in a file of their own, compact as in a shard, until its clips are encoded. What a
killed process has encoded is not encoded again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

from attrs import frozen
from distill_conditioning import UnitFolder
from distill_media import MediaItem
from distill_runfile.progress import Progress

from distill_preprocess.encoding import CaptionTable, Encoder

_log = logging.getLogger(__name__)


@frozen(eq=False)
class CaptionFiles:
    """The files of captions in the folder of a data set, while it is made."""

    folder: UnitFolder
    items: Sequence[MediaItem]
    encoder: Encoder

    def encode(self, units: Sequence[int], batch_size: int) -> None:
        """Encode what is missing of the captions of ``units``, so many at a time."""
        missing = [unit for unit in units if self._captions(unit) and not self.path(unit).exists()]
        if not missing:
            return
        progress = Progress(sum(len(self._captions(unit)) for unit in missing), "captions", _log)
        for unit in missing:
            table, captions = CaptionTable(self.encoder), self._captions(unit)
            for first in range(0, len(captions), batch_size):
                table.encode(captions[first : first + batch_size])
            table.save(self.path(unit))
            progress.advance(len(captions))

    def path(self, unit: int) -> Path:
        """Return the file of a unit: another one for other captions, and for another encoder."""
        content = (self._captions(unit), sorted(self.encoder.fingerprint.items()))
        name = hashlib.blake2b(repr(content).encode("utf-8", "backslashreplace"), digest_size=8)
        return self.folder.folder / f".captions-{unit:05d}-{name.hexdigest()}.safetensors"

    def remove_all(self) -> None:
        """Remove what is left of the files, and of those that a killed process began, once no unit
        is missing."""
        for file in self.folder.folder.glob("*.captions-*"):
            file.unlink(missing_ok=True)

    def _captions(self, unit: int) -> list[str]:
        items = (self.items[number] for number in self.folder.items_of(unit))
        return list(
            dict.fromkeys(text for item in items if item.problem is None for text in item.captions)
        )
