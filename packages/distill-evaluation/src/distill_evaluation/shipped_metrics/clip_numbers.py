"""Numbers that are measured of each clip, and averaged over all."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from attrs import field, frozen
from distill_protocols import Metric, Samples
from torch import Tensor

LARGEST_PART = 1 << 24
"""Numbers of clips that are measured together, unless one clip has more: their measures take ten
times the memory."""


@frozen(eq=False, kw_only=True)
class ClipNumbers(Metric):
    """The mean over all clips of measures that give one number a clip.

    Attributes:
        of_clips: by name, measures of clips [N, 3, F, H, W].
        of_pairs: by name, measures of clips and the reference's.
    """

    of_clips: Mapping[str, Callable[[Tensor], Tensor]] = field(factory=dict)
    of_pairs: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = field(factory=dict)

    def measure(self, samples: Samples) -> dict[str, Tensor]:
        clips = samples.all_clips
        size = max(1, LARGEST_PART // clips[0].numel())
        parts = clips.split(size)
        rows = {
            name: torch.cat([measure(part) for part in parts])
            for name, measure in self.of_clips.items()
        }
        if self.of_pairs and samples.reference is not None:
            references = samples.reference.all_clips.split(size)
            rows |= {
                name: torch.cat([compare(*pair) for pair in zip(parts, references, strict=True)])
                for name, compare in self.of_pairs.items()
            }
        return {name: samples.by_prompt(values.cpu()) for name, values in rows.items()}

    def combine(self, rows: Mapping[str, Tensor]) -> dict[str, float]:
        return {name: float(values.double().mean()) for name, values in rows.items()}
