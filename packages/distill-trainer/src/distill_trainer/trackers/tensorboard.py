"""Numbers, texts and clips for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from distill_trainer.trackers.gif import clips_to_gif, side_by_side


class TensorBoardTracker:
    """Writes event files into ``folder``; a clip is an animated GIF among the images."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._writer: SummaryWriter | None = None

    def log_scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        writer = self._open(iteration)
        for name, value in values.items():
            writer.add_scalar(name, value, iteration)

    def log_text(self, iteration: int, name: str, text: str) -> None:
        self._open(iteration).add_text(name, text, iteration)

    def log_video(self, iteration: int, name: str, clips: Tensor, fps: float) -> None:
        # SummaryWriter.add_video wants moviepy for this; an image summary may hold any GIF.
        _, height, width, _ = side_by_side(clips[:, :, :1]).shape
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=clips_to_gif(clips, fps)
        )
        writer = self._open(iteration)
        assert writer.file_writer is not None
        writer.file_writer.add_summary(
            Summary(value=[Summary.Value(tag=name, image=image)]), iteration
        )

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self, iteration: int) -> SummaryWriter:
        # On first use, because only then a resumed run knows where it continues: purge_step hides
        # events of the former run after that, which may have come further than its checkpoint.
        if self._writer is None:
            self._writer = SummaryWriter(str(self.folder), purge_step=iteration)
        return self._writer
