"""Save, keep, resume."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_protocols import Callback, CheckpointError, DistillError, RunState
from torch import distributed

from distill_checkpoint.changes import check_changes
from distill_checkpoint.config import CheckpointConfig
from distill_checkpoint.files import (
    discarded_on_error,
    read_json,
    remove_folder,
    sync_folder,
    sync_tree,
    write_json,
)
from distill_checkpoint.layout import DELETED, REPLACED, STAGING, checkpoints, folder_name
from distill_checkpoint.manifest import Manifest, inspect, write_manifest
from distill_checkpoint.retention import superseded
from distill_checkpoint.state import load_state, non_finite_weights, save_state

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Saves a run as ``checkpoint-<iteration>`` folders and resumes it bit for bit.

    A checkpoint appears whole or not at all: everything is written to a staging folder, the
    manifest with sizes and checksums last, then fsynced and renamed. Old ones are deleted only
    after a new one is there. Files are safetensors and JSON: nothing in them can run code.

    Args:
        config: the run file's ``checkpoint`` section.
        output_dir: where the checkpoints are; made on the first save.
        resolved_config: the whole run file as read (JSON-able), kept in each checkpoint.

    Raises:
        CheckpointError: ``resolved_config`` is not JSON-able, or there are several ranks (one
            process saves for now).
    """

    def __init__(
        self,
        config: CheckpointConfig,
        output_dir: Path | str,
        resolved_config: Mapping[str, Any],
    ) -> None:
        self.config = config
        self.output_dir = Path(output_dir)
        self._resolved_config = _json_able(resolved_config)
        self._saved: int | None = None
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            raise CheckpointError(
                f"{distributed.get_world_size()} ranks: this release saves from one process only, "
                "and would leave the other ranks' state out. Train on one rank."
            )

    def resume(self, run: RunState, callbacks: Mapping[str, Callback]) -> int:
        """Put everything back as ``checkpoint.resume`` says.

        Call it after every callback's ``on_train_start``: averages made there are loaded into.

        Returns:
            The last finished iteration; 0 to start afresh.

        Raises:
            CheckpointError: the checkpoint is damaged or of another run, none is whole, its
                optimizers had other settings, or starting from it would mix two runs in the
                output folder.
        """
        self._clear_leftovers()
        source, manifest = self._source()
        iteration = manifest.iteration if manifest else 0
        if self.config.resume != "latest":
            self._refuse_newer_than(iteration)
        if source is None:
            return 0
        try:
            check_changes(source, read_json(source / "config.json"), self._resolved_config)
            load_state(source, run, callbacks)
        except DistillError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{source}: its state is undamaged but could not be put back "
                f"({type(error).__name__}: {error}); the run file or the code has changed since. "
                "Resume with those of the saved run."
            ) from error
        if source.parent.resolve() == self.output_dir.resolve():
            self._saved = iteration
        logger.info("resumed %s: iteration %d is done", source, iteration)
        return iteration

    def after_step(self, run: RunState, callbacks: Mapping[str, Callback]) -> None:
        """Save every ``every_steps`` iterations."""
        if self.config.every_steps and run.iteration % self.config.every_steps == 0:
            self.save(run, callbacks)

    def finish(self, run: RunState, callbacks: Mapping[str, Callback]) -> None:
        """Save the end (``save_at_end``), or where a requested stop found the run."""
        wanted = self.config.save_at_end or run.stop_reason is not None
        if wanted and run.iteration > 0 and run.iteration != self._saved:
            self.save(run, callbacks)

    def save(self, run: RunState, callbacks: Mapping[str, Callback]) -> Path:
        """Write ``checkpoint-<run.iteration>`` now, then delete what it supersedes.

        Raises:
            NonFiniteLossError: a loss was inf or nan since the last look; nothing is saved.
            CheckpointError: it could not be written, or trained weights are inf or nan; the
                checkpoints before it are untouched.
        """
        run.check_finite()
        self._refuse_spoilt_weights(run)
        began = time.perf_counter()
        target = self.output_dir / folder_name(run.iteration)
        staging = self.output_dir / f"{STAGING}{target.name}"
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            with discarded_on_error(staging):
                save_state(staging, run, callbacks)
                write_json(staging / "config.json", self._resolved_config)
                manifest = write_manifest(staging, run.iteration)
                sync_tree(staging)
                self._commit(staging, target)
        except (OSError, CheckpointError) as error:
            raise CheckpointError(
                f"{target} could not be saved: {error}. The checkpoints before it are untouched. "
                "Make room or mend the folder, then resume with checkpoint.resume: latest."
            ) from error
        self._saved = run.iteration
        size = sum(facts.size for facts in manifest.files.values())
        seconds = time.perf_counter() - began
        logger.info("saved %s: %.1f MB in %.2f s", target, size / 1e6, seconds)
        self._delete_superseded()
        return target

    # -- inside -------------------------------------------------------------------------------

    def _refuse_spoilt_weights(self, run: RunState) -> None:
        spoilt = non_finite_weights(run.method.bundle)
        if spoilt:
            raise CheckpointError(
                f"iteration {run.iteration} is not saved: {'; '.join(spoilt[:5])}"
                f"{' ...' if len(spoilt) > 5 else ''} ({len(spoilt)} tensors) hold inf or nan. "
                "Saved weights must be finite, because a run that goes on from them is lost "
                "without a sign. Resume from the checkpoint before (checkpoint.resume: latest) "
                "with a cause removed: a lower learning rate, gradient clipping, more precision."
            )

    def _source(self) -> tuple[Path | None, Manifest | None]:
        """The folder to resume from, every byte of it compared with its manifest."""
        if self.config.resume == "none":
            return None, None
        if self.config.resume == "latest":
            return self._newest_whole()
        folder = Path(self.config.resume)
        found = inspect(folder, checksums=True)
        if found.manifest is None:
            raise CheckpointError(
                f"{folder} is not a whole checkpoint: {found.damage}. Nothing of it was loaded, "
                "because a run that goes on from damaged state is wrong without a sign. Resume "
                "from another one, or set checkpoint.resume: latest for the newest whole one."
            )
        return folder, found.manifest

    def _newest_whole(self) -> tuple[Path | None, Manifest | None]:
        skipped = []
        for iteration, folder in checkpoints(self.output_dir).items():
            found = inspect(folder, checksums=True)
            if found.manifest is not None and found.manifest.iteration == iteration:
                return folder, found.manifest
            reason = found.damage or "its manifest is of another iteration, so it was renamed"
            logger.warning("skipped %s: %s", folder, reason)
            skipped.append(f"{folder.name}: {reason}")
        if skipped:
            raise CheckpointError(
                f"checkpoint.resume is 'latest', and none of the checkpoints in {self.output_dir} "
                f"is whole ({'; '.join(skipped)}). Starting afresh would hide that, so it must be "
                "asked for: name another checkpoint, or use a new output folder with "
                "checkpoint.resume: none."
            )
        logger.warning("no checkpoint in %s: this run starts afresh", self.output_dir)
        return None, None

    def _refuse_newer_than(self, iteration: int) -> None:
        newer = [
            folder.name
            for number, folder in checkpoints(self.output_dir).items()
            if number > iteration and inspect(folder, checksums=False).manifest
        ]
        if newer:
            raise CheckpointError(
                f"{self.output_dir} already holds {', '.join(newer)}, beyond iteration "
                f"{iteration}, where this run would start: old and new checkpoints would mix, and "
                "the next 'latest' could take up the wrong run. Set checkpoint.resume: latest, or "
                "move them away, or use another output folder."
            )

    def _commit(self, staging: Path, target: Path) -> None:
        """Rename; a folder of that name (damaged, or of a run resumed from before it) gives way."""
        aside = target.with_name(f"{REPLACED}{target.name}")
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
            target.rename(aside)
        try:
            staging.rename(target)
        except OSError:
            if aside.exists():
                aside.rename(target)
            raise
        sync_folder(target.parent)
        if aside.exists():
            shutil.rmtree(aside, ignore_errors=True)

    def _clear_leftovers(self) -> None:
        """Remove what a killed process left under dot names."""
        if not self.output_dir.is_dir():
            return
        for path in sorted(self.output_dir.iterdir()):
            if path.name.startswith(REPLACED):
                # Killed between the two renames of a commit: the old one is still the newest.
                target = path.with_name(path.name.removeprefix(REPLACED))
                if not target.exists():
                    path.rename(target)
                    continue
            if path.name.startswith((STAGING, DELETED, REPLACED)):
                logger.info("removed %s, left by a process that was killed", path)
                shutil.rmtree(path, ignore_errors=True)

    def _delete_superseded(self) -> None:
        folders = checkpoints(self.output_dir)
        whole = [i for i, folder in folders.items() if inspect(folder, checksums=False).manifest]
        for iteration in superseded(
            whole, keep_last=self.config.keep_last, keep_every=self.config.keep_every
        ):
            try:
                remove_folder(folders[iteration])
            except OSError as error:
                # The new checkpoint is safe; a full disk will be heard of at the next save.
                logger.warning("%s could not be deleted: %s", folders[iteration], error)


def _json_able(config: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(config), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the resolved config cannot be written as JSON ({error}), and each checkpoint keeps "
            "it in config.json; hand over plain values (numbers, strings, lists, mappings)"
        ) from error
