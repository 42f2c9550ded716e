"""What is looked at and measured while a run trains: clips for people to watch, and losses on
held-out data. Neither changes the run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from attrs import asdict
from distill_media import caption_clips, enlarge, read_last_frames, read_mp4, shrink
from distill_protocols import (
    Callback,
    Capabilities,
    Condition,
    ConditioningProvider,
    DataError,
    Latents,
    RoleHandle,
    RunState,
    SamplerSpec,
    SampleView,
    StepRecord,
    flatten_parts,
    restore_parts,
)
from distill_runtime import (
    RowPartition,
    json_text,
    local_shard,
    open_file,
    raw_bytes,
    replace_folder,
    to_uint8,
)
from PIL import Image
from torch import Tensor

from distill_trainer.config import ValidationConfig
from distill_trainer.validation.files import (
    KEPT,
    LATENTS,
    PREDICTIONS,
    SMALLEST_SIDE,
    ShownView,
    choose_frames,
    read_kept,
    read_latents,
    write_clips,
    write_kept,
    write_over_time,
    write_predictions,
    write_record,
)
from distill_trainer.validation.losses import HeldOutLosses, LossEvaluator
from distill_trainer.validation.modes import eval_mode
from distill_trainer.validation.predictions import Predictions, latent_views, source_view

_WEIGHTS_HASHED = 16
"""Numbers of each parameter of a frozen role, evenly spread, by which its weights are known."""
_LONGEST_SIDE = 480
"""Pixels of a clip in a tracker, at most: all of them are there beside each other. Files have all
pixels."""


class ValidationCallback(Callback):
    """Samples the same prompts from the same noise through every view, and writes the clips.

    Clips go to ``validation/iteration-<n>/<view>/``, one a prompt, with a contact sheet of all
    views and ``validation.json``; to the trackers as ``validation/<view>``, with their captions,
    and what roles predict as ``validation/x0/<number>``;
    and ``validation/over_time/<view>.png`` shows a view in all validations up to now. Noise comes
    from ``ValidationConfig.seed`` and the prompt's place through the method, so no generator of
    the run moves; modules sample in eval mode and get their own modes back.

    A view of a role that is not trained always gives the same clips. They are sampled once and
    kept in ``validation/kept/``, under a hash of what they depend on, so that neither the next
    validation nor a resumed run samples them again, and a run file that states something else
    does. Trackers get them once a process.

    The prompts are divided among the ranks of the run, and the clips are those of one process. Rank
    0 alone writes.

    Losses on held-out data become metrics of the iteration (``HeldOutLosses.metrics``). Those that
    are measured before the first iteration or after the last one go to the trackers at once.

    Args:
        config: what to sample, and when.
        conditioning: encodes the prompts, once, at the start of the run.
        identities: by role, what its weights and clips are known by (paths, sizes), for kept
            clips. Of a role that is not there its name is all that is known.
        losses: measures losses on held-out data; None: none are.
        capabilities: of the adapter, which say whether guidance reads a negative condition.
    """

    name = "validation"

    def __init__(
        self,
        config: ValidationConfig,
        conditioning: ConditioningProvider,
        *,
        identities: Mapping[str, object] | None = None,
        losses: LossEvaluator | None = None,
        capabilities: Capabilities | None = None,
    ) -> None:
        self.config = config
        self._capabilities = capabilities or Capabilities()
        self._conditioning = conditioning
        self._identities = identities or {}
        self._losses = losses
        self._cond: Condition | None = None
        self._views = [
            SampleView(
                name=name,
                role=view.role,
                sampler=view.sampler,
                ema=view.ema,
                latent_frames=view.latent_frames,
            )
            for name, view in config.views.items()
        ]
        self._kept: dict[str, str] = {}
        """By frozen view, the folder of its clips, relative to ``validation/``."""
        self._predictions: Predictions | None = None
        self._in_trackers: set[str] = set()
        self._last = 0

    def on_train_start(self, run: RunState) -> None:
        # Now, not at the first validation: a prompt that cannot be encoded must not end a long run.
        run.method.bundle.require_roles(view.role for view in self._views)
        if not self._views:
            return
        self._cond = self._encode(self.config)
        self._kept = {
            view.name: f"{KEPT}/{view.role}-{self._key(run, view)}"
            for view in self._views
            if not run.method.bundle[view.role].trainable
        }
        if self.config.x0 is not None:
            latent_views(run)
            run.method.bundle.require_roles(self.config.x0.roles)
            source = source_view(self.config.x0, self.config.views, tuple(self._kept))
            self._predictions = Predictions(
                config=self.config.x0, view=source, seed=self.config.seed
            )

    def on_step_start(self, run: RunState) -> None:
        # Not in on_train_start: a run that is resumed gets its weights after that.
        if run.iteration == 1 and self.config.at_start:
            _log(run, 0, self._validate(run, 0))

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        if self.config.every_steps and step.iteration % self.config.every_steps == 0:
            run.metrics |= self._validate(run, step.iteration)

    def on_train_end(self, run: RunState) -> None:
        # A stop that was asked for (preemption) has no time left for clips.
        if self.config.at_end and run.stop_reason is None and self._last != run.iteration:
            _log(run, run.iteration, self._validate(run, run.iteration))

    # -- inside -------------------------------------------------------------------------------

    def _encode(self, config: ValidationConfig) -> Condition:
        """Encode the prompts, and the frames that are given of their clips."""
        encode = self._conditioning.encode
        if config.videos:
            images = read_video_ends(config.videos, config.video_frames)
        else:
            images = read_images(config.images) if config.images else None
        if not config.last_images:
            return encode(config.prompts, images)
        return encode(config.prompts, images, last_images=read_images(config.last_images))

    def _validate(self, run: RunState, iteration: int) -> dict[str, float]:
        """Return what was measured, by name of the metric."""
        run.check_finite()
        self._last = iteration
        root = run.output_dir / "validation"
        clips: dict[str, np.ndarray | None] = {}
        work = len(self._views) + (self._losses is not None) + (self._predictions is not None)
        latents: Latents | None = None
        for number, view in enumerate(self._views):
            run.report_progress("validation", number, work)
            # For methods that sample without polling. Of views that move nothing is written before
            # all are done.
            run.method.stop.poll()
            if view.name not in self._kept:
                own, clips[view.name] = self._sample(run, view)
                latents = own if own is not None else latents
            elif not run.ranks.run_on_first(lambda view=view: self._is_kept(root, view)):
                own, pixels = self._sample(run, view)
                whole = None if own is None else _gather(self._partition(run), own)
                run.ranks.run_on_first(
                    lambda view=view, p=pixels, w=whole: self._keep(root, view, p, w)
                )
        run.report_progress("validation", len(self._views), work)
        predicted = self._predict(run, root, latents)
        run.report_progress("validation", work - (self._losses is not None), work)
        losses = self._losses.evaluate(run) if self._losses else None
        run.ranks.run_on_first(lambda: self._write(run, root, iteration, clips, predicted, losses))
        run.report_progress("validation", work, work)
        return losses.metrics() if losses else {}

    def _partition(self, run: RunState) -> RowPartition:
        return RowPartition(run.ranks, len(self.config.prompts))

    def _sample(self, run: RunState, view: SampleView) -> tuple[Latents | None, np.ndarray | None]:
        """Return this rank's latents, of the view whose clips are noised; and clips of all prompts
        [N, T, H, W, 3] uint8 on rank 0."""
        assert self._cond is not None, "on_train_start has not run"
        partition, latents = self._partition(run), None
        seed, rows = self.config.seed, partition.own
        cond = self._cond[torch.tensor(rows)]
        with torch.no_grad(), eval_mode(run.method.model_dict.values()):
            if self._is_noised(view):
                method = latent_views(run)
                latents = method.sample_latents(view, cond, seed=seed, rows=rows)
                clips = method.decode_latents(latents)
            else:
                made = run.method.sample_for_logging([view], cond, seed=seed, rows=rows)
                clips = made[view.name]
        gathered = partition.gather(to_uint8(clips))
        return latents, None if gathered is None else gathered.numpy()

    def _is_noised(self, view: SampleView) -> bool:
        return self._predictions is not None and self._predictions.view == view.name

    def _is_kept(self, root: Path, view: SampleView) -> bool:
        folder = root / self._kept[view.name]
        if self._is_noised(view) and not (folder / LATENTS).is_file():
            return False
        return read_kept(folder, len(self.config.prompts)) is not None

    def _keep(
        self, root: Path, view: SampleView, clips: np.ndarray | None, latents: Latents | None
    ) -> None:
        assert clips is not None, "rank 0 has all clips"
        write_kept(root / self._kept[view.name], clips, self.config.fps, latents)

    def _predict(
        self, run: RunState, root: Path, latents: Latents | None
    ) -> dict[float, np.ndarray]:
        """Return what ``Predictions.make`` does; nothing where it is not asked for.

        Args:
            latents: of this rank's clips; None: the view whose clips are noised is kept.
        """
        if self._predictions is None:
            return {}
        assert self._cond is not None
        partition, view = self._partition(run), self._predictions.view
        if latents is None:
            # From the file on every rank, also where it was just written: all of them see the same.
            latents = run.ranks.run_each(
                lambda: read_latents(root / self._kept[view], partition.own)
            )
        cond = self._cond[torch.tensor(partition.own)]
        return self._predictions.make(run, latents, cond, partition)

    def _write(
        self,
        run: RunState,
        root: Path,
        iteration: int,
        clips: Mapping[str, np.ndarray | None],
        predicted: Mapping[float, np.ndarray],
        losses: HeldOutLosses | None,
    ) -> None:
        shown: list[ShownView] = []
        films: Mapping[str, np.ndarray] = {}
        folder = root / f"iteration-{iteration:06d}"
        # A resumed run may come to this iteration a second time, and replaces what is there.
        with replace_folder(folder, only_writer=True) as stage:
            for view in self._views:
                pixels = clips.get(view.name)
                if pixels is None:
                    shown.append(self._show_kept(run, root, view))
                    continue
                (stage / view.name).mkdir()
                files = write_clips(stage / view.name, pixels, self.config.fps)
                place = f"{folder.name}/{view.name}"
                shown.append(_shown(run, view, place, files, choose_frames(pixels)))
            more: dict[str, object] = {"losses": asdict(losses)} if losses else {}
            if self._predictions is not None:
                columns, folder_of_all = self._predictions.columns, stage / PREDICTIONS
                films = write_predictions(
                    folder_of_all, self.config.prompts, columns, predicted, self.config.fps
                )
                more["x0"] = {
                    "folder": f"{folder.name}/{PREDICTIONS}",
                    "files": list(films),
                    "view": self._predictions.view,
                    "roles": self._predictions.config.roles,
                    "t": self._predictions.config.t,
                }
            write_record(stage, iteration, self.config.fps, self.config.prompts, shown, more)
        write_over_time(root, self.config.prompts, shown)
        for view in shown:
            pixels = clips.get(view.name)
            if pixels is None and view.name not in self._in_trackers:
                pixels = _read_clips(root / view.folder, view.files)
                self._in_trackers.add(view.name)
            if pixels is not None:
                self._track(run, iteration, view.name, pixels)
        for name, film in films.items():
            self._log_clips(run, iteration, f"{PREDICTIONS}/{Path(name).stem}", film[None])

    def _show_kept(self, run: RunState, root: Path, view: SampleView) -> ShownView:
        place = self._kept[view.name]
        kept = read_kept(root / place, len(self.config.prompts))
        if kept is None:
            raise DataError(
                f"{root / place} was there when this validation began and is not whole now; a run "
                "needs its output folder for itself. Let nothing else write there"
            )
        files, frames = kept
        return _shown(run, view, place, files, frames, is_frozen=True)

    def _track(self, run: RunState, iteration: int, view: str, clips: np.ndarray) -> None:
        """Give clips [N, T, H, W, 3] to the trackers, with their captions, in a size to read."""
        if not run.trackers:
            return
        sized = shrink(enlarge(clips, SMALLEST_SIDE), _LONGEST_SIDE)
        self._log_clips(run, iteration, view, caption_clips(sized, self.config.prompts))

    def _log_clips(self, run: RunState, iteration: int, name: str, clips: np.ndarray) -> None:
        video = torch.from_numpy(np.ascontiguousarray(clips)).movedim(-1, 1) / 255
        for tracker in run.trackers:
            tracker.log_video(iteration, f"validation/{name}", video, self.config.fps)

    def _key(self, run: RunState, view: SampleView) -> str:
        """Hash everything that the clips of a frozen view follow from."""
        assert self._cond is not None
        spec = _spec(run, view)
        named = {
            "role": view.role,
            "identity": self._identities.get(view.role),
            "sampler": None if spec is None else asdict(spec),
            "latent_frames": view.latent_frames,
            "seed": self.config.seed,
            "fps": self.config.fps,
            "prompts": list(self.config.prompts),
        }
        digest = hashlib.sha256(json_text(named).encode())
        # What the prompts became, and not their encoder's name: pictures are in it as well.
        conditions = [self._cond]
        if spec is not None and self._capabilities.reads_negative(*spec.guidances):
            conditions.append(self._conditioning.negative())
        for condition in conditions:
            for name, value in sorted(condition.tensors.items()):
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(raw_bytes(value))
        # And the weights themselves, not the path alone: another model may have taken its place.
        own = _weights_digest(run.method.bundle[view.role])
        # Each once, so that a role which every rank has whole is the same on any number of them.
        for of_rank in dict.fromkeys(run.ranks.gather_results(lambda: own)):
            digest.update(of_rank.encode())
        return digest.hexdigest()[:12]


def _weights_digest(role: RoleHandle) -> str:
    """Hash a few numbers of each parameter that this process holds, or holds a shard of."""
    digest = hashlib.sha256()
    for key, module in role.modules.items():
        for name, parameter in module.named_parameters():
            values = local_shard(parameter.detach()).flatten()
            stride = max(1, values.numel() // _WEIGHTS_HASHED)
            digest.update(f"{key}.{name} {tuple(parameter.shape)}".encode())
            digest.update(raw_bytes(values[::stride]))
    return digest.hexdigest()


def _log(run: RunState, iteration: int, metrics: Mapping[str, float]) -> None:
    """Give to the trackers what was measured outside of an iteration, none of which logs it."""
    if metrics:
        for tracker in run.trackers:
            tracker.log_scalars(iteration, metrics)


def _spec(run: RunState, view: SampleView) -> SamplerSpec | None:
    return view.sampler or run.method.sampler_spec


def _shown(
    run: RunState,
    view: SampleView,
    folder: str,
    files: tuple[str, ...],
    frames: np.ndarray,
    *,
    is_frozen: bool = False,
) -> ShownView:
    return ShownView(
        name=view.name,
        role=view.role,
        ema=view.ema,
        sampler=_spec(run, view),
        folder=folder,
        files=files,
        frames=frames,
        is_frozen=is_frozen,
    )


def _read_clips(folder: Path, files: Sequence[str]) -> np.ndarray:
    """Read clips that ``write_clips`` wrote, [N, T, H, W, 3]."""
    clips = []
    for name in files:
        if name.endswith(".png"):
            with Image.open(folder / name, formats=("PNG",)) as file:
                clips.append(np.asarray(file.convert("RGB"))[None])
        else:
            clips.append(read_mp4(folder / name))
    return np.stack(clips)


def read_images(paths: Sequence[str]) -> Tensor:
    """Read PNG or JPEG files as [B, 3, H_px, W_px] in [0, 1].

    Raises:
        DataError: a file is no such image, or they are not of one size.
    """
    images = []
    for path in paths:
        try:
            with (
                open_file(Path(path)) as content,
                Image.open(content, formats=("PNG", "JPEG")) as file,
            ):
                flat = torch.frombuffer(bytearray(file.convert("RGB").tobytes()), dtype=torch.uint8)
                images.append(flat.view(file.height, file.width, 3).permute(2, 0, 1) / 255)
        except (OSError, SyntaxError) as error:
            raise DataError(
                f"{path} cannot be read as a PNG or JPEG image ({error}); a clip cannot begin "
                "with it. Save it again, or name another."
            ) from error
    return _stack(images, paths)


def read_video_ends(paths: Sequence[str], count: int) -> Tensor:
    """Read the last ``count`` frames of videos as [B, 3, count, H_px, W_px] in [0, 1].

    Raises:
        DataError: a file is no video or shorter, or they are not of one size.
    """
    ends = [torch.from_numpy(read_last_frames(Path(path), count)) for path in paths]
    return _stack([frames.permute(3, 0, 1, 2) / 255 for frames in ends], paths)


def _stack(images: Sequence[Tensor], paths: Sequence[str]) -> Tensor:
    sizes = {tuple(image.shape[-2:]) for image in images}
    if len(sizes) > 1:
        raise DataError(
            f"{', '.join(paths)} have several sizes (height, width): {sorted(sizes)}; all must "
            "have the size of the run's clips. Scale and crop them."
        )
    return torch.stack(list(images))


def _gather(partition: RowPartition, latents: Latents) -> Latents | None:
    """Return latents of all prompts on rank 0; elsewhere None."""
    rows = partition.gather(flatten_parts(latents).float())
    return None if rows is None else restore_parts(rows, latents)
