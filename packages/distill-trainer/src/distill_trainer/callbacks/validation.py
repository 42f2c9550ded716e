"""Clips sampled while training, for people to watch. Sampling them never changes the run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from distill_media import clips_to_gif
from distill_protocols import (
    Callback,
    Condition,
    ConditioningProvider,
    DataError,
    RunState,
    SampleView,
    StepRecord,
)
from distill_runtime import RowPartition, json_text, replace_folder, to_uint8
from PIL import Image
from torch import Tensor, nn

from distill_trainer.config import ValidationConfig


class ValidationCallback(Callback):
    """Samples the same prompts from the same noise through every view, and writes the clips.

    Clips go to the trackers as ``validation/<view>`` and to
    ``validation/iteration-<n>/<view>.gif``, one column per prompt. Noise comes from
    ``ValidationConfig.seed`` and the prompt's place through the method, so no generator of the run
    moves; modules sample in eval mode and get their own modes back.

    The prompts are divided among the ranks of the run, and the clips are those of one process. Rank
    0 alone writes.

    Args:
        config: what to sample, and when.
        conditioning: encodes the prompts, once, at the start of the run.
    """

    name = "validation"

    def __init__(self, config: ValidationConfig, conditioning: ConditioningProvider) -> None:
        self.config = config
        self._conditioning = conditioning
        self._cond: Condition | None = None
        self._views = [
            SampleView(name=name, role=view.role, sampler=view.sampler, ema=view.ema)
            for name, view in config.views.items()
        ]
        self._last = 0

    def on_train_start(self, run: RunState) -> None:
        # Now, not at the first validation: a prompt that cannot be encoded must not end a long run.
        run.method.bundle.require_roles(view.role for view in self._views)
        images = read_images(self.config.images) if self.config.images else None
        self._cond = self._conditioning.encode(self.config.prompts, images)

    def on_step_start(self, run: RunState) -> None:
        # Not in on_train_start: a run that is resumed gets its weights after that.
        if run.iteration == 1 and self.config.at_start:
            self._validate(run, 0)

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        if self.config.every_steps and step.iteration % self.config.every_steps == 0:
            self._validate(run, step.iteration)

    def on_train_end(self, run: RunState) -> None:
        # A stop that was asked for (preemption) has no time left for clips.
        if self.config.at_end and run.stop_reason is None and self._last != run.iteration:
            self._validate(run, run.iteration)

    def _validate(self, run: RunState, iteration: int) -> None:
        run.check_finite()
        self._last = iteration
        partition = RowPartition(run.ranks, len(self.config.prompts))
        clips: dict[str, Tensor] = {}
        for view in self._views:
            # For methods that sample without polling. Nothing is written before all views are done.
            run.method.stop.poll()
            clips |= self._sample(run, view, partition)
        run.ranks.run_on_first(lambda: self._write(run, iteration, clips))

    def _sample(
        self, run: RunState, view: SampleView, partition: RowPartition
    ) -> dict[str, Tensor]:
        """Return clips of all prompts on rank 0; elsewhere nothing."""
        assert self._cond is not None, "on_train_start has not run"
        cond = self._cond[torch.tensor(partition.own)]
        with torch.no_grad(), _eval_mode(run.method.model_dict.values()):
            clips = run.method.sample_for_logging(
                [view], cond, seed=self.config.seed, rows=partition.own
            )
        gathered = {name: partition.gather(clip.float()) for name, clip in clips.items()}
        return {name: clip for name, clip in gathered.items() if clip is not None}

    def _write(self, run: RunState, iteration: int, clips: dict[str, Tensor]) -> None:
        for name, clip in clips.items():
            for tracker in run.trackers:
                tracker.log_video(iteration, f"validation/{name}", clip, self.config.fps)
        # A resumed run may come to this iteration a second time, and replaces what is there.
        folder = run.output_dir / "validation" / f"iteration-{iteration:06d}"
        with replace_folder(folder, only_writer=True) as stage:
            for name, clip in clips.items():
                pixels = to_uint8(clip).numpy()
                (stage / f"{name}.gif").write_bytes(clips_to_gif(pixels, self.config.fps))
            (stage / "prompts.json").write_text(json_text(list(self.config.prompts)))


def read_images(paths: Sequence[str]) -> Tensor:
    """Read PNG or JPEG files as [B, 3, H_px, W_px] in [0, 1].

    Raises:
        DataError: a file is no such image, or they are not of one size.
    """
    images = []
    for path in paths:
        try:
            with Image.open(path, formats=("PNG", "JPEG")) as file:
                flat = torch.frombuffer(bytearray(file.convert("RGB").tobytes()), dtype=torch.uint8)
                images.append(flat.view(file.height, file.width, 3).permute(2, 0, 1) / 255)
        except (OSError, SyntaxError) as error:
            raise DataError(
                f"{path} cannot be read as a PNG or JPEG image ({error}); a clip cannot begin "
                "with it. Save it again, or name another."
            ) from error
    sizes = {tuple(image.shape[1:]) for image in images}
    if len(sizes) > 1:
        raise DataError(
            f"the images {', '.join(paths)} have several sizes (height, width): {sorted(sizes)}; "
            "all must have the size of the run's clips. Scale and crop them."
        )
    return torch.stack(images)


@contextlib.contextmanager
def _eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    # Flags instead of module.eval(): train() at the end would switch on parts that were off before.
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, training in modes:
            part.training = training
