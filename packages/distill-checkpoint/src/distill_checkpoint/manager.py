"""Save, keep, resume.

A save, on all ranks together::

    refuse inf and nan  ->  capture (snapshot.py)  ->  [copy to buffers, then in the background:]
    staging folder  ->  every rank writes its files  ->  rank 0: manifest, check, rename
    ->  rank 0 deletes what the new one supersedes

A resume::

    clear leftovers  ->  newest intact checkpoint, every byte verified (manifest.py)
    ->  which settings differ (changed_settings.py), which state goes where (resume_plan.py)
    ->  compare, load (restore.py)
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from distill_protocols import (
    Callback,
    CheckpointError,
    DistillError,
    RestartableSchedule,
    RunState,
)
from distill_runtime import FileInfo, Ranks, readable_bytes
from torch import Tensor

from distill_checkpoint.changed_settings import (
    ChangedKey,
    change_notes,
    changed_keys,
    changed_optimizers,
    need_restart,
    optimizers_problem,
    scale_problems,
)
from distill_checkpoint.config import CheckpointConfig
from distill_checkpoint.manifest import (
    CONFIG,
    Contents,
    Inspection,
    find_damage,
    inspect,
    read_config,
    write_manifest,
)
from distill_checkpoint.output_folder import (
    clear_leftovers,
    delete_checkpoint,
    find_superseded,
    folder_name,
    list_checkpoints,
    new_staging_folder,
    publish,
)
from distill_checkpoint.restore import check_plan, load_state
from distill_checkpoint.resume_plan import ResumePlan, plan_resume
from distill_checkpoint.snapshot import (
    BackgroundJob,
    Snapshot,
    SnapshotBuffers,
    capture,
    non_finite_weights,
)
from distill_checkpoint.tensors import new_checkpoint_group, to_full

logger = logging.getLogger(__name__)

STALL = "time/checkpoint"
"""Metric: seconds for which a save held up the training."""


class CheckpointManager:
    """Saves a run as ``checkpoint-<iteration>`` folders and resumes it bit for bit.

    A checkpoint appears complete or not at all: everything is written to a staging folder, the
    manifest with sizes and checksums last, then fsynced and renamed. Old ones are deleted only
    after a new one is there. Files are safetensors and JSON: nothing in them can run code.

    On several ranks of torch.distributed every rank makes one and calls it at the same points;
    they share one ``output_dir``. What fails on one rank fails on all.

    Args:
        config: when to save, what to keep, where to resume from.
        output_dir: where the checkpoints are; made on the first save.
        resolved_config: the whole run file as read (JSON-able), kept in each checkpoint.

    Raises:
        CheckpointError: ``resolved_config`` is not JSON-able.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        output_dir: Path | str,
        resolved_config: Mapping[str, object],
    ) -> None:
        self.config = config
        self.output_dir = Path(output_dir)
        self._resolved_config = _json_able(resolved_config)
        self._last_saved: int | None = None
        self._ranks: tuple[Ranks, Ranks] | None = None
        self._background = BackgroundJob()
        self._buffers = SnapshotBuffers()
        self._warned_unmeasured = False

    def resume(self, run: RunState, callbacks: Mapping[str, Callback]) -> int:
        """Restore everything from the checkpoint that ``config.resume`` names.

        Call it after every callback's ``on_train_start``: averages made there are loaded into.

        Returns:
            The last finished iteration; 0 to start afresh.

        Raises:
            CheckpointError: the checkpoint is damaged or of another run, none is intact, its
                optimizers were of another kind, or starting from it would mix two runs in the
                output folder.
        """
        self._background.wait()
        ranks, _ = self._groups()
        ranks.run_on_first(lambda: clear_leftovers(self.output_dir))
        source, iteration = self._find_intact_checkpoint(ranks)
        if self.config.resume != "latest":
            ranks.run_on_first(lambda: self._refuse_newer_than(iteration))
        if source is None:
            return 0
        # Each rank compares and loads by itself. One that refuses stops the others after they have
        # loaded; the run ends then.
        notes = ranks.run_each(lambda: self._load(source, run, callbacks, ranks))
        if ranks.is_first:
            for note in notes:
                logger.warning("resuming %s: %s", source.name, note)
            logger.info("resumed %s: iteration %d is done", source, iteration)
        if source.resolve() == (self.output_dir / folder_name(iteration)).resolve():
            self._last_saved = iteration
        return iteration

    def after_step(self, run: RunState, callbacks: Mapping[str, Callback]) -> None:
        """Save every ``every_steps`` iterations.

        Raises:
            CheckpointError: this save failed, or one that was under way. Several ranks raise the
                latter at their next save, so that all of them stop at the same point.
        """
        if self.config.every_steps and run.iteration % self.config.every_steps == 0:
            self.save(run, callbacks)
        elif self._background.has_failed and self._groups()[0].size == 1:
            # One process raises at once; several do at their next save, all at the same call.
            self._background.wait()

    def finish(self, run: RunState, callbacks: Mapping[str, Callback]) -> None:
        """Save the end (``save_at_end``), or where a requested stop interrupted the run.

        Nothing is under way when this returns.
        """
        self._background.wait()
        wanted = self.config.save_at_end or run.stop_reason is not None
        if wanted and run.iteration > 0 and run.iteration != self._last_saved:
            self.save(run, callbacks)
            self._background.wait()

    def on_exception(self, run: RunState, error: BaseException) -> None:
        """Wait for a save under way: it was made before the error.

        With a rank gone this lasts up to ``timeout_seconds``.
        """
        self._background.wait()

    def save(self, run: RunState, callbacks: Mapping[str, Callback]) -> Path:
        """Write ``checkpoint-<run.iteration>``, then delete what it supersedes.

        With ``async_save`` it only copies what is to be written, after the save before is done;
        the rest goes on in the background.

        Raises:
            NonFiniteLossError: a loss was inf or nan since the last check; nothing is saved.
            CheckpointError: it could not be written, or trained weights are inf or nan; the
                checkpoints before it are untouched. Or the save before failed.
        """
        began = time.perf_counter()
        self._background.wait()
        waited = time.perf_counter() - began
        ranks, background_ranks = self._groups()
        target = self.output_dir / folder_name(run.iteration)
        ranks.run_each(lambda: _refuse_non_finite(run))
        try:
            snapshot = capture(run, callbacks, ranks, self.config.changes)
        except CheckpointError as error:
            raise _failed_save(target, error) from error
        snapshot.documents[Path(CONFIG)] = self._resolved_config
        metrics = self._metrics_to_keep(run, target.name, ranks)
        kept_until = frozenset(run.kept_until)
        if self.config.async_save:
            copied = self._buffers.copy(snapshot)
            self._background.start(
                lambda: self._write(copied, target, metrics, kept_until, background_ranks)
            )
        else:
            self._write(snapshot, target, metrics, kept_until, ranks)
        self._last_saved = run.iteration
        stall = time.perf_counter() - began
        run.metrics[STALL] = run.carried[STALL] = stall
        if ranks.is_first:
            # The time of a synchronous one is that of its write, which is logged anyway.
            logger.log(
                logging.INFO if self.config.async_save or waited > 1 else logging.DEBUG,
                "iteration %d: %s save held up the training for %.2f s, %.2f s of it for the "
                "save before",
                run.iteration,
                "an asynchronous" if self.config.async_save else "a synchronous",
                stall,
                waited,
            )
        return target

    # -- save ---------------------------------------------------------------------------------

    def _write(
        self,
        snapshot: Snapshot,
        target: Path,
        metrics: Mapping[str, float],
        kept_until: Collection[int],
        ranks: Ranks,
    ) -> None:
        """Write each rank's part, all ranks together; rank 0 makes it a checkpoint."""
        began = time.perf_counter()
        try:
            staging = ranks.run_on_first(lambda: new_staging_folder(target))
            try:
                files = snapshot.write(staging, ranks)
                # Only now, as `write` returns on no rank before the files of all are on the disk.
                ranks.run_on_first(
                    lambda: _commit(staging, target, snapshot.iteration, files, metrics)
                )
            except BaseException:
                # The error under way is the one to report, not that of clearing up behind it.
                if ranks.is_first:
                    shutil.rmtree(staging, ignore_errors=True)
                raise
        except (OSError, CheckpointError) as error:
            raise _failed_save(target, error) from error
        if ranks.is_first:
            size = sum(info.size for info in files.values())
            seconds = time.perf_counter() - began
            logger.info("saved %s: %s in %.2f s", target, readable_bytes(size), seconds)
            # Rank 0 alone, after the last common step: it must not raise, and logs what fails.
            self._delete_superseded(snapshot.iteration, kept_until)

    def _metrics_to_keep(self, run: RunState, name: str, ranks: Ranks) -> dict[str, float]:
        """Return the metric that ``keep_best`` compares, if it was measured in this iteration.

        As trackers show it, the mean over the ranks that have it. All ranks call it together.
        """
        rule = self.config.keep_best
        if rule is None:
            return {}
        by_rank = ranks.gather_results(lambda: _as_float(run.metrics.get(rule.metric)))
        values = [value for value in by_rank if value is not None]
        if values:
            mean = sum(values) / len(values)
            return {rule.metric: mean} if math.isfinite(mean) else {}
        if ranks.is_first and not self._warned_unmeasured:
            self._warned_unmeasured = True
            logger.warning(
                "%s is no candidate for keep_best, as %s was not measured in that iteration "
                "(measured: %s). Save in iterations in which it is: let every_steps be a multiple "
                "of how often it is measured. This is logged once.",
                name, rule.metric, ", ".join(sorted(run.metrics)) or "nothing",
            )  # fmt: skip
        return {}

    def _delete_superseded(self, saved: int, kept_until: Collection[int]) -> None:
        """Delete what ``saved``, the newest checkpoint of this run, supersedes.

        Later ones are damaged (``resume`` has passed them over, and refuses to start before intact
        ones). That may show in their checksums alone, so nothing is deleted for their sake.
        """
        try:
            folders = list_checkpoints(self.output_dir)
        except OSError as error:
            logger.warning("no old checkpoint was deleted, as they cannot be listed: %s", error)
            return
        manifests = {
            iteration: inspect(folder, checksums=False).manifest
            for iteration, folder in folders.items()
            if iteration <= saved
        }
        metrics = {i: manifest.metrics for i, manifest in manifests.items() if manifest is not None}
        for iteration in find_superseded(
            metrics,
            keep_last=self.config.keep_last,
            keep_every=self.config.keep_every,
            keep_best=self.config.keep_best,
            kept_until=kept_until,
        ):
            try:
                if not delete_checkpoint(folders[iteration]):
                    logger.info("%s stays for now: another process reads it", folders[iteration])
            except OSError as error:
                # The new checkpoint is safe; a full disk will be an error of the next save.
                logger.warning("%s could not be deleted: %s", folders[iteration], error)

    # -- resume -------------------------------------------------------------------------------

    def _load(
        self, source: Path, run: RunState, callbacks: Mapping[str, Callback], ranks: Ranks
    ) -> list[str]:
        """Plan, compare and load; returns notes for the log."""
        try:
            contents = Contents.read(source)
            plan, notes = self._plan(source, contents, run, callbacks)
            check_plan(source, run, plan)
            return [*notes, *load_state(source, contents, run, callbacks, plan, ranks)]
        except DistillError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{source}: its state is undamaged but could not be put back "
                f"({type(error).__name__}: {error}); the run file or the code has changed since. "
                "Resume with those of the saved run."
            ) from error

    def _plan(
        self, source: Path, contents: Contents, run: RunState, callbacks: Mapping[str, Callback]
    ) -> tuple[ResumePlan, list[str]]:
        """Decide which state goes where, the run files compared; and notes for the log."""
        if contents.origin is not None:
            roles = ", ".join(contents.by_role("roles"))
            raise CheckpointError(
                f"{source} holds weights only ({contents.origin}): no optimizer state, generators "
                "or data position, so there is nothing to go on with exactly. Start a new run "
                f"from its weights ({roles}): init_from of a role."
            )
        then = read_config(source)
        changed = changed_keys(then, self._resolved_config)
        by_role = changed_optimizers(changed)
        plan = plan_resume(contents, run.method.bundle, callbacks, self.config.changes, by_role)
        refused: dict[str, list[ChangedKey]] = {}
        for role in plan.other_settings:
            schedules = run.method.bundle.roles[role].schedulers.values()
            if all(isinstance(schedule, RestartableSchedule) for schedule in schedules):
                refused[role] = need_restart(by_role[role])
            else:
                # torch's own schedules take their rates from the state that they load.
                refused[role] = by_role[role]
        refused = {role: changes for role, changes in sorted(refused.items()) if changes}
        if refused:
            raise CheckpointError(optimizers_problem(source, refused))
        loaded = [role for role, _ in plan.modules("roles")]
        for _, problem in scale_problems(source, then, self._resolved_config, loaded):
            raise CheckpointError(problem)
        kept = sorted(plan.other_settings)
        return plan, [*change_notes(changed, self._resolved_config, kept), *plan.notes]

    def _find_intact_checkpoint(self, ranks: Ranks) -> tuple[Path | None, int]:
        """Find the folder to resume from, and compare its every byte with its manifest."""
        if self.config.resume == "none":
            return None, 0
        if self.config.resume == "latest":
            return self._find_newest_intact(ranks)
        folder = Path(self.config.resume)
        inspection = _inspect_together(folder, ranks)
        if inspection.manifest is None:
            raise CheckpointError(
                f"{folder} is not an intact checkpoint: {inspection.damage}. Nothing of it was "
                "loaded, because a run that goes on from damaged state is wrong without a sign. "
                "Resume from another one, or set resume: latest for the newest intact one."
            )
        return folder, inspection.manifest.iteration

    def _find_newest_intact(self, ranks: Ranks) -> tuple[Path | None, int]:
        skipped = []
        for iteration, folder in ranks.run_on_first(
            lambda: list_checkpoints(self.output_dir)
        ).items():
            inspection = _inspect_together(folder, ranks)
            if inspection.manifest is not None and inspection.manifest.iteration == iteration:
                return folder, iteration
            reason = inspection.damage or "its manifest is of another iteration: it was renamed"
            if ranks.is_first:
                logger.warning("skipped %s: %s", folder, reason)
            skipped.append(f"{folder.name}: {reason}")
        if skipped:
            raise CheckpointError(
                f"The newest checkpoint is to be resumed, and none of those in {self.output_dir} "
                f"is intact ({'; '.join(skipped)}). Starting afresh would hide that, so it must be "
                "asked for: name another checkpoint, or use a new output folder with resume: none."
            )
        if ranks.is_first:
            logger.info("no checkpoint in %s: this run starts afresh", self.output_dir)
        return None, 0

    def _refuse_newer_than(self, iteration: int) -> None:
        newer = [
            folder.name
            for number, folder in list_checkpoints(self.output_dir).items()
            if number > iteration and inspect(folder, checksums=False).manifest
        ]
        if newer:
            raise CheckpointError(
                f"{self.output_dir} already holds {', '.join(newer)}, beyond iteration "
                f"{iteration}, where this run would start: old and new checkpoints would mix, and "
                "the next resume of the latest could take up the wrong run. Set resume: latest, or "
                "move them away, or use another output folder."
            )

    def _groups(self) -> tuple[Ranks, Ranks]:
        """Return the ranks for the training thread, and for the one in the background.

        Two groups: collectives of two threads in one group would meet each other's messages. Not
        ``run.ranks``: a save may take longer, and its errors are others. The first call makes the
        groups, so all ranks make it at the same point (in ``resume``, or at the first save).
        """
        if self._ranks is None:
            timeout = self.config.timeout_seconds
            self._ranks = (new_checkpoint_group(timeout), new_checkpoint_group(timeout))
        return self._ranks


def _refuse_non_finite(run: RunState) -> None:
    run.check_finite()
    names = non_finite_weights(run.method.bundle)
    if names:
        raise CheckpointError(
            f"iteration {run.iteration} is not saved: {'; '.join(names[:5])}"
            f"{' ...' if len(names) > 5 else ''} ({len(names)} tensors) hold inf or nan. "
            "Saved weights must be finite, because a run that goes on from them is lost "
            "without a sign. Resume from the checkpoint before (resume: latest) "
            "with a cause removed: a lower learning rate, gradient clipping, more precision."
        )


def _commit(
    staging: Path,
    target: Path,
    iteration: int,
    files: Mapping[str, FileInfo],
    metrics: Mapping[str, float],
) -> None:
    write_manifest(staging, iteration, files, metrics)
    inspection = inspect(staging, checksums=False)
    if inspection.damage:  # another process in the folder, or a disk that loses files
        raise CheckpointError(f"what was just written is not intact: {inspection.damage}")
    publish(staging, target)


def _inspect_together(folder: Path, ranks: Ranks) -> Inspection:
    """``inspect`` with checksums; each rank reads its share of the files.

    Rank 0 alone reads the manifest: on a network file system two hosts can see two states of it,
    and ranks that decide differently would load different checkpoints, or wait for ever.
    """
    inspection = ranks.run_on_first(lambda: inspect(folder, checksums=False))
    if inspection.manifest is None:
        return inspection
    files = inspection.manifest.files
    own = sorted(files, key=lambda name: -files[name].size)[ranks.rank :: ranks.size]
    reasons = ranks.gather_results(lambda: find_damage(folder, {name: files[name] for name in own}))
    damage = next((reason for reason in reasons if reason), None)
    return Inspection(damage=damage) if damage else inspection


def _failed_save(target: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{target} could not be saved: {error}. The checkpoints before it are untouched. "
        "Make room or mend the folder, then resume with resume: latest."
    )


def _as_float(metric: Tensor | float | None) -> float | None:
    """Return a metric as a number; a sharded one (DTensor) is gathered, so all ranks call it."""
    if metric is None:
        return None
    return float(to_full(metric) if isinstance(metric, Tensor) else metric)


def _json_able(config: Mapping[str, object]) -> dict[str, object]:
    try:
        return json.loads(json.dumps(dict(config), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the resolved config cannot be written as JSON ({error}), and each checkpoint keeps "
            "it in config.json; hand over plain values (numbers, strings, lists, mappings)"
        ) from error
