"""Clips to look at while training. They never change the run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence

import torch
from distill_protocols import (
    Callback,
    ConditioningProvider,
    DataError,
    RunState,
    SampleView,
    StepRecord,
)
from distill_runtime import RowPartition
from PIL import Image
from torch import Tensor, nn

from distill_trainer.config import ValidationConfig
from distill_trainer.gif import clips_to_gif


class ValidationCallback(Callback):
    """Samples the same prompts from the same noise through every view, and writes what comes.

    Clips go to the trackers as ``validation/<view>`` and to
    ``validation/iteration-<n>/<view>.gif``, one column a prompt. Noise comes from
    ``ValidationConfig.seed`` and the prompt's place through the method, so no generator of the run
    moves; modules sample in eval mode and get their own modes back.

    The prompts are spread over the ranks of the run, and what comes is that of one process. Rank 0
    alone writes.

    Args:
        config: what to look at, and when.
        conditioning: encodes the prompts, once, at the start of the run.
    """

    name = "validation"

    def __init__(self, config: ValidationConfig, conditioning: ConditioningProvider) -> None:
        self.config = config
        self._conditioning = conditioning
        self._cond = None
        self._views = [
            SampleView(name=name, role=view.role, sampler=view.sampler, ema=view.ema)
            for name, view in config.views.items()
        ]
        self._last = 0

    def on_train_start(self, run: RunState) -> None:
        # Now, not at the first look: a prompt that cannot be encoded must not end a long run.
        run.method.bundle.require_roles(view.role for view in self._views)
        images = read_pictures(self.config.images) if self.config.images else None
        self._cond = self._conditioning.encode(self.config.prompts, images)

    def on_step_start(self, run: RunState) -> None:
        # Not in on_train_start: a run that is resumed gets its weights after that.
        if run.iteration == 1 and self.config.at_start:
            self._look(run, 0)

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        if self.config.every_steps and step.iteration % self.config.every_steps == 0:
            self._look(run, step.iteration)

    def on_train_end(self, run: RunState) -> None:
        # A stop that was asked for (preemption) has no time left for clips.
        if self.config.at_end and run.stop_reason is None and self._last != run.iteration:
            self._look(run, run.iteration)

    def _look(self, run: RunState, iteration: int) -> None:
        run.check_finite()
        self._last = iteration
        spread = RowPartition(run.ranks, len(self.config.prompts))
        clips: dict[str, Tensor] = {}
        for view in self._views:
            # For methods that sample without polling. Nothing is written before all have come.
            run.method.stop.poll()
            clips |= self._sample(run, view, spread)
        run.ranks.run_on_first(lambda: self._show(run, iteration, clips))

    def _sample(self, run: RunState, view: SampleView, spread: RowPartition) -> dict[str, Tensor]:
        """Of all prompts on rank 0; elsewhere nothing."""
        assert self._cond is not None, "on_train_start has not run"
        cond = self._cond[torch.tensor(spread.own)]
        with torch.no_grad(), _eval_mode(run.method.model_dict.values()):
            clips = run.method.sample_for_logging(
                [view], cond, seed=self.config.seed, rows=spread.own
            )
        whole = {name: spread.gather(clip.float()) for name, clip in clips.items()}
        return {name: clip for name, clip in whole.items() if clip is not None}

    def _show(self, run: RunState, iteration: int, clips: dict[str, Tensor]) -> None:
        for name, clip in clips.items():
            for tracker in run.trackers:
                tracker.log_video(iteration, f"validation/{name}", clip, self.config.fps)
        self._write(run, iteration, clips)

    def _write(self, run: RunState, iteration: int, clips: dict[str, Tensor]) -> None:
        folder = run.output_dir / "validation" / f"iteration-{iteration:06d}"
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, clip in clips.items():
            (part / f"{name}.gif").write_bytes(clips_to_gif(clip, self.config.fps))
        (part / "prompts.json").write_text(json.dumps(list(self.config.prompts), indent=2))
        # A resumed run may look at this iteration a second time.
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)


def read_pictures(paths: Sequence[str]) -> Tensor:
    """PNG or JPEG files as [B, 3, H_px, W_px] in [0, 1].

    Raises:
        DataError: a file is no picture, or they are not of one size.
    """
    pictures = []
    for path in paths:
        try:
            with Image.open(path, formats=("PNG", "JPEG")) as file:
                flat = torch.frombuffer(bytearray(file.convert("RGB").tobytes()), dtype=torch.uint8)
                pictures.append(flat.view(file.height, file.width, 3).permute(2, 0, 1) / 255)
        except (OSError, SyntaxError) as error:
            raise DataError(
                f"{path} is no PNG or JPEG picture that can be read ({error}); a clip cannot begin "
                "with it. Save it again, or name another"
            ) from error
    sizes = {tuple(picture.shape[1:]) for picture in pictures}
    if len(sizes) > 1:
        raise DataError(
            f"validation.images are of several sizes (height, width): {sorted(sizes)}; all must be "
            "of the size of the run's clips. Scale and crop them"
        )
    return torch.stack(pictures)


@contextlib.contextmanager
def _eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, training in modes:
            part.training = training
