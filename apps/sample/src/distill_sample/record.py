"""``samples.json``: what the clips beside it were made of, and which of them are there."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from attrs import define, field
from distill_runfile import to_plain
from distill_runtime import json_text, replace_file

from distill_sample.files import clip_stem, find_clip
from distill_sample.model import Model
from distill_sample.request import Request
from distill_sample.sources import RECORD_FILE


@define
class SampleRecord:
    """The record of one call of the app.

    Attributes:
        roles: what each role that was begun is made of, and its times once they are known.
    """

    model: Model
    request: Request
    roles: list[dict[str, object]] = field(factory=list)

    def begin(self, role: str) -> dict[str, object]:
        """Add a role, and return its entry."""
        own = self.model.source.roles[role]
        weights = "live" if own.weights else "of its path"
        if own.init_from is not None:
            is_export = own.init_from.path == str(self.model.source.folder)
            weights = "of the export" if is_export else "of init_from"
        entry: dict[str, object] = {
            "role": role,
            "weights": "ema" if own.ema else weights,
            "sampler": to_plain(self.model.spec(role)),
        }
        self.roles.append(entry)
        return entry

    def remove_former(self) -> None:
        """Remove the record and the clips of a former call that this one would replace, so that
        every file that is named is of this call."""
        (self.request.to / RECORD_FILE).unlink(missing_ok=True)
        for number, prompt in enumerate(self.request.prompts):
            for role in self.model.source.roles:
                while path := self._find(number, prompt, role):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def write(self, *, complete: bool) -> None:
        """Write what is there.

        Args:
            complete: whether it is all that was asked for.
        """
        clips = [
            {"prompt": prompt, "seed": self.request.seed + number, "files": files}
            for number, prompt in enumerate(self.request.prompts)
            if (files := self._files(number, prompt))
        ]
        if not clips:  # the folder holds nothing of this call
            return
        record = {
            "source": self.model.source.name,
            "complete": complete,
            "roles": self.roles,
            "clips": clips,
        }
        with replace_file(self.request.to / RECORD_FILE) as part:
            part.write_text(json_text(record))

    @contextlib.contextmanager
    def kept(self, *, here: bool) -> Iterator[None]:
        """Write the record at the end, also where an interrupt or an error is the end.

        Args:
            here: whether this process writes it.
        """
        complete = False
        try:
            yield
            complete = True
        finally:
            if here:
                self.write(complete=complete)

    def _files(self, number: int, prompt: str) -> dict[str, str]:
        paths = ((str(r["role"]), self._find(number, prompt, str(r["role"]))) for r in self.roles)
        return {role: path.name for role, path in paths if path is not None}

    def _find(self, number: int, prompt: str, role: str) -> Path | None:
        stem = clip_stem(number, prompt, role)
        return find_clip(self.request.to, stem, self.request.format)
