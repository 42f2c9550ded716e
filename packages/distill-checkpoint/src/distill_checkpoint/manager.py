"""Save, keep, resume."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from distill_protocols import Callback, CheckpointError, DistillError, RunState
from distill_runtime import Ranks
from torch import Tensor

from distill_checkpoint.background import Background, Buffers
from distill_checkpoint.capture import Snapshot, capture
from distill_checkpoint.changes import (
    change_notes,
    changes,
    optimizer_changes,
    refuse_changed_optimizers,
    refuse_changed_scales,
)
from distill_checkpoint.commit import clear_leftovers, new_staging, publish
from distill_checkpoint.config import CheckpointConfig
from distill_checkpoint.files import FileFacts, read_json, remove_folder
from distill_checkpoint.fitting import Fit, fit
from distill_checkpoint.layout import checkpoints, folder_name
from distill_checkpoint.manifest import Finding, damaged, inspect, write_manifest
from distill_checkpoint.parts import non_finite_weights
from distill_checkpoint.restore import check_fit, load_state
from distill_checkpoint.retention import superseded
from distill_checkpoint.serving import ranks_that_save
from distill_checkpoint.tensors import to_whole

logger = logging.getLogger(__name__)

STALL = "time/checkpoint"
"""Metric: seconds for which a save held up the training."""


class CheckpointManager:
    """Saves a run as ``checkpoint-<iteration>`` folders and resumes it bit for bit.

    A checkpoint appears whole or not at all: everything is written to a staging folder, the
    manifest with sizes and checksums last, then fsynced and renamed. Old ones are deleted only
    after a new one is there. Files are safetensors and JSON: nothing in them can run code.

    On several ranks of torch.distributed every rank makes one and calls it at the same points;
    they share one ``output_dir``. What fails on one rank fails on all.

    Args:
        config: the run file's ``checkpoint`` section.
        output_dir: where the checkpoints are; made on the first save.
        resolved_config: the whole run file as read (JSON-able), kept in each checkpoint.

    Raises:
        CheckpointError: ``resolved_config`` is not JSON-able.
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
        self._ranks: tuple[Ranks, Ranks] | None = None
        self._background = Background()
        self._buffers = Buffers()
        self._unmeasured_told = False

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
        self._background.wait()
        ranks, _ = self._groups()
        ranks.run_on_first(lambda: clear_leftovers(self.output_dir))
        source, iteration = self._source(ranks)
        if self.config.resume != "latest":
            ranks.run_on_first(lambda: self._refuse_newer_than(iteration))
        if source is None:
            return 0
        notes: list[str] = []
        ranks.gather_results(lambda: self._load(source, run, callbacks, ranks, notes))
        if ranks.is_first:
            for note in notes:
                logger.warning("resuming %s: %s", source.name, note)
            logger.info("resumed %s: iteration %d is done", source, iteration)
        if source.resolve() == (self.output_dir / folder_name(iteration)).resolve():
            self._saved = iteration
        return iteration

    def after_step(self, run: RunState, callbacks: Mapping[str, Callback]) -> None:
        """Save every ``every_steps`` iterations.

        Raises:
            CheckpointError: this save failed, or one that was under way. Several ranks hear of
                the latter at their next save, so that all of them stop at the same point.
        """
        if self.config.every_steps and run.iteration % self.config.every_steps == 0:
            self.save(run, callbacks)
        elif self._background.failed and self._groups()[0].size == 1:
            self._background.wait()

    def finish(self, run: RunState, callbacks: Mapping[str, Callback]) -> None:
        """Save the end (``save_at_end``), or where a requested stop found the run.

        Nothing is under way when this returns.
        """
        self._background.wait()
        wanted = self.config.save_at_end or run.stop_reason is not None
        if wanted and run.iteration > 0 and run.iteration != self._saved:
            self.save(run, callbacks)
            self._background.wait()

    def on_exception(self, run: RunState, error: BaseException) -> None:
        """Wait for a save under way: it was made before the error."""
        self._background.wait()

    def save(self, run: RunState, callbacks: Mapping[str, Callback]) -> Path:
        """Write ``checkpoint-<run.iteration>``, then delete what it supersedes.

        With ``async_save`` it only copies what is to be written, after the save before is done;
        the rest goes on in the background.

        Raises:
            NonFiniteLossError: a loss was inf or nan since the last look; nothing is saved.
            CheckpointError: it could not be written, or trained weights are inf or nan; the
                checkpoints before it are untouched. Or the save before failed.
        """
        began = time.perf_counter()
        self._background.wait()
        waited = time.perf_counter() - began
        ranks, beside = self._groups()
        target = self.output_dir / folder_name(run.iteration)
        ranks.gather_results(lambda: _refuse_spoilt(run))
        applied = {"changes": attrs.asdict(self.config.changes)}
        try:
            snapshot = capture(run, callbacks, ranks, applied)
        except CheckpointError as error:
            raise _failed(target, error) from error
        snapshot.documents[Path("config.json")] = self._resolved_config
        metrics = self._measured(run, target.name, ranks)
        if self.config.async_save:
            held = self._buffers.copied(snapshot)
            self._background.start(lambda: self._write(held, target, metrics, beside))
        else:
            self._write(snapshot, target, metrics, ranks)
        self._saved = run.iteration
        stall = time.perf_counter() - began
        run.metrics[STALL] = run.carried[STALL] = stall
        if ranks.is_first:
            how = "an asynchronous" if self.config.async_save else "a synchronous"
            logger.info(
                "iteration %d: %s save held up the training for %.2f s, %.2f s of it for the "
                "save before",
                run.iteration, how, stall, waited,
            )  # fmt: skip
        return target

    # -- save ---------------------------------------------------------------------------------

    def _write(
        self, snapshot: Snapshot, target: Path, metrics: Mapping[str, float], ranks: Ranks
    ) -> None:
        """All ranks together, each its part; rank 0 makes it a checkpoint."""
        began = time.perf_counter()
        try:
            staging = ranks.run_on_first(lambda: new_staging(target))
            try:
                files = snapshot.write(staging, ranks)
                ranks.run_on_first(
                    lambda: _commit(staging, target, snapshot.iteration, files, metrics)
                )
            except BaseException:
                # The error under way is the one to hear of, not that of clearing up behind it.
                if ranks.is_first:
                    shutil.rmtree(staging, ignore_errors=True)
                raise
        except (OSError, CheckpointError) as error:
            raise _failed(target, error) from error
        if ranks.is_first:
            size = sum(facts.size for facts in files.values())
            seconds = time.perf_counter() - began
            logger.info("saved %s: %.1f MB in %.2f s", target, size / 1e6, seconds)
            self._delete_superseded(snapshot.iteration)

    def _measured(self, run: RunState, name: str, ranks: Ranks) -> dict[str, float]:
        """What ``keep_best`` compares, if it was measured in this iteration: as trackers show it,
        the mean over the ranks that have it. All ranks call it together.
        """
        rule = self.config.keep_best
        if rule is None:
            return {}
        told = ranks.gather_results(lambda: _number(run.metrics.get(rule.metric)))
        found = [value for value in told if value is not None]
        if found:
            value = sum(found) / len(found)
            return {rule.metric: value} if math.isfinite(value) else {}
        if ranks.is_first and not self._unmeasured_told:
            self._unmeasured_told = True
            logger.warning(
                "%s is no candidate for checkpoint.keep_best, as %s was not measured in that "
                "iteration (measured: %s). Save in iterations in which it is: let every_steps be "
                "a multiple of how often it is measured. This is said once.",
                name, rule.metric, ", ".join(sorted(run.metrics)) or "nothing",
            )  # fmt: skip
        return {}

    def _delete_superseded(self, saved: int) -> None:
        """What ``saved``, the newest of this run, supersedes.

        Later ones are damaged (``resume`` has passed them over, and refuses to start before whole
        ones). That may show in their checksums alone, so nothing is deleted for their sake.
        """
        try:
            folders = checkpoints(self.output_dir)
        except OSError as error:
            logger.warning("no old checkpoint was deleted, as they cannot be listed: %s", error)
            return
        found = {
            iteration: inspect(folder, checksums=False).manifest
            for iteration, folder in folders.items()
            if iteration <= saved
        }
        metrics = {i: manifest.metrics for i, manifest in found.items() if manifest is not None}
        for iteration in superseded(
            metrics,
            keep_last=self.config.keep_last,
            keep_every=self.config.keep_every,
            keep_best=self.config.keep_best,
        ):
            try:
                remove_folder(folders[iteration])
            except OSError as error:
                # The new checkpoint is safe; a full disk will be heard of at the next save.
                logger.warning("%s could not be deleted: %s", folders[iteration], error)

    # -- resume -------------------------------------------------------------------------------

    def _load(
        self,
        source: Path,
        run: RunState,
        callbacks: Mapping[str, Callback],
        ranks: Ranks,
        notes: list[str],
    ) -> None:
        try:
            fitting, told = self._fit(source, run, callbacks)
            notes += told
            notes += load_state(source, run, callbacks, fitting, ranks)
        except DistillError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{source}: its state is undamaged but could not be put back "
                f"({type(error).__name__}: {error}); the run file or the code has changed since. "
                "Resume with those of the saved run."
            ) from error

    def _fit(
        self, source: Path, run: RunState, callbacks: Mapping[str, Callback]
    ) -> tuple[Fit, list[str]]:
        """What goes where, all of it compared; and what there is to say of it."""
        loop = read_json(source / "loop.json")
        if loop["origin"] is not None:
            roles = ", ".join(dict.fromkeys(role for role, _ in loop["roles"]))
            raise CheckpointError(
                f"{source} holds weights only ({loop['origin']}): no optimizer state, generators "
                "or data position, so there is nothing to go on with exactly. Start a new run "
                f"from its weights ({roles}): models.<role>.init_from."
            )
        then = read_json(source / "config.json")
        found = changes(then, self._resolved_config)
        reset = optimizer_changes(found)
        fitting = fit(loop, run.method.bundle, callbacks, self.config.changes, reset)
        fresh = {thing[1] for thing in fitting.fresh if thing[0] == "optimizers"}
        refuse_changed_optimizers(source, {r: c for r, c in reset.items() if r not in fresh})
        loaded = [role for role, _ in fitting.parts("roles")]
        refuse_changed_scales(source, then, self._resolved_config, loaded)
        check_fit(source, run, fitting)
        return fitting, [*change_notes(found, self._resolved_config), *fitting.notes]

    def _source(self, ranks: Ranks) -> tuple[Path | None, int]:
        """The folder to resume from, every byte of it compared with its manifest."""
        if self.config.resume == "none":
            return None, 0
        if self.config.resume == "latest":
            return self._newest_whole(ranks)
        folder = Path(self.config.resume)
        found = _verified(folder, ranks)
        if found.manifest is None:
            raise CheckpointError(
                f"{folder} is not a whole checkpoint: {found.damage}. Nothing of it was loaded, "
                "because a run that goes on from damaged state is wrong without a sign. Resume "
                "from another one, or set checkpoint.resume: latest for the newest whole one."
            )
        return folder, found.manifest.iteration

    def _newest_whole(self, ranks: Ranks) -> tuple[Path | None, int]:
        skipped = []
        for iteration, folder in ranks.run_on_first(lambda: checkpoints(self.output_dir)).items():
            found = _verified(folder, ranks)
            if found.manifest is not None and found.manifest.iteration == iteration:
                return folder, iteration
            reason = found.damage or "its manifest is of another iteration, so it was renamed"
            if ranks.is_first:
                logger.warning("skipped %s: %s", folder, reason)
            skipped.append(f"{folder.name}: {reason}")
        if skipped:
            raise CheckpointError(
                f"checkpoint.resume is 'latest', and none of the checkpoints in {self.output_dir} "
                f"is whole ({'; '.join(skipped)}). Starting afresh would hide that, so it must be "
                "asked for: name another checkpoint, or use a new output folder with "
                "checkpoint.resume: none."
            )
        if ranks.is_first:
            logger.info("no checkpoint in %s: this run starts afresh", self.output_dir)
        return None, 0

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

    def _groups(self) -> tuple[Ranks, Ranks]:
        """The ranks for the training thread, and for the one in the background."""
        if self._ranks is None:
            timeout = self.config.timeout_seconds
            self._ranks = (ranks_that_save(timeout), ranks_that_save(timeout))
        return self._ranks


def _refuse_spoilt(run: RunState) -> None:
    run.check_finite()
    spoilt = non_finite_weights(run.method.bundle)
    if spoilt:
        raise CheckpointError(
            f"iteration {run.iteration} is not saved: {'; '.join(spoilt[:5])}"
            f"{' ...' if len(spoilt) > 5 else ''} ({len(spoilt)} tensors) hold inf or nan. "
            "Saved weights must be finite, because a run that goes on from them is lost "
            "without a sign. Resume from the checkpoint before (checkpoint.resume: latest) "
            "with a cause removed: a lower learning rate, gradient clipping, more precision."
        )


def _commit(
    staging: Path,
    target: Path,
    iteration: int,
    files: Mapping[str, FileFacts],
    metrics: Mapping[str, float],
) -> None:
    write_manifest(staging, iteration, files, metrics)
    found = inspect(staging, checksums=False)
    if found.damage:  # another process in the folder, or a disk that loses files
        raise CheckpointError(f"what was just written is not whole: {found.damage}")
    publish(staging, target)


def _verified(folder: Path, ranks: Ranks) -> Finding:
    """``inspect`` with checksums, the reading shared among the ranks."""
    found = ranks.run_on_first(lambda: inspect(folder, checksums=False))
    if found.manifest is None:
        return found
    files = found.manifest.files
    mine = sorted(files, key=lambda name: -files[name].size)[ranks.rank :: ranks.size]
    reasons = ranks.gather_results(lambda: damaged(folder, {name: files[name] for name in mine}))
    damage = next((reason for reason in reasons if reason), None)
    return Finding(damage=damage) if damage else found


def _failed(target: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{target} could not be saved: {error}. The checkpoints before it are untouched. "
        "Make room or mend the folder, then resume with checkpoint.resume: latest."
    )


def _number(metric: Tensor | float | None) -> float | None:
    """Of a sharded one (DTensor) each rank has a part: all ask."""
    if metric is None:
        return None
    return float(to_whole(metric) if isinstance(metric, Tensor) else metric)


def _json_able(config: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(config), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the resolved config cannot be written as JSON ({error}), and each checkpoint keeps "
            "it in config.json; hand over plain values (numbers, strings, lists, mappings)"
        ) from error
