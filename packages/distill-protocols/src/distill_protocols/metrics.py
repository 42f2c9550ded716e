"""What a metric measures, and on what: samples of a report, real clips, a reference entry.

A metric is measured in two steps, since prompts are divided among the processes of a run. Each
process turns the clips of its own prompts into rows, one a prompt; the rows of all prompts come
together, in their order, on the first process, which turns them into numbers. So the numbers do
not depend on how many processes there are. No torch here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Literal, TypeVar, cast

from attrs import define, field, frozen

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

Better = Literal["lower", "higher", "near_1"]
MetricInput = Literal["judge", "real_latents", "reference"]
ValueT = TypeVar("ValueT")


@frozen(kw_only=True)
class MetricNumber:
    """One number that a metric gives for each entry of a report.

    Attributes:
        help: what it is, with its unit, in a line.
        better: which values are good; None: neither by itself, compare it with a reference.
        digits: behind the point, in tables.
        by_judge: it depends on the report's judge, and on what that one does not see.
    """

    help: str
    better: Better | None = None
    digits: int = 3
    by_judge: bool = False


@frozen(kw_only=True)
class MetricInputs:
    """What a report has for its metrics to read; known without torch, from its section alone.

    Attributes:
        prompts: that are sampled; empty where their file cannot be read.
        clips_per_prompt: clips of each.
        fps: frames a second, of what is written for tools that read files.
        judge: folder of a judge.
        real_latents: file of real clips' latents.
        reference: name of the entry that the others are compared with, clip by clip.
    """

    prompts: tuple[str, ...]
    clips_per_prompt: int
    fps: float
    judge: Path | None = None
    real_latents: Path | None = None
    reference: str | None = None

    def has(self, name: MetricInput) -> bool:
        """Tell whether an input is there."""
        given = {
            "judge": self.judge, "real_latents": self.real_latents, "reference": self.reference,
        }  # fmt: skip
        return given[name] is not None


@define(eq=False)
class Shared:
    """Values that several metrics need and one of them computes: features of a network, a loaded
    judge."""

    _values: dict[Hashable, object] = field(factory=dict)

    def get(self, key: Hashable, compute: Callable[[], ValueT]) -> ValueT:
        """Return the value called ``key``, computed by whoever asks first."""
        if key not in self._values:
            self._values[key] = compute()
        return cast(ValueT, self._values[key])


@frozen(eq=False, kw_only=True)
class RealClips:
    """Clips of the data, through the run's VAE, on the CPU.

    Attributes:
        clips: [N, 3, F, H, W] in [0, 1].
        latents: [N, C, T, H, W], normalised, as the model sees them.
    """

    clips: Tensor
    latents: Tensor


@frozen(eq=False, kw_only=True)
class Samples:
    """Clips that one process made of its own prompts, all of an entry; on the CPU.

    Attributes:
        prompts: P of them; empty: these are real clips, whose captions are not known.
        rows: the places of the prompts among all of the report.
        clips: [P, K, 3, F, H, W] in [0, 1], K of each prompt.
        latents: [P, K, C, T, H, W], normalised.
        reference: those of the reference entry, from the same prompts and the same noise; None:
            there is none, or these are its own.
        shared: values that several metrics need of these samples.
    """

    prompts: tuple[str, ...]
    rows: tuple[int, ...]
    clips: Tensor
    latents: Tensor
    reference: Samples | None = None
    shared: Shared = field(factory=Shared)

    @property
    def all_clips(self) -> Tensor:
        """The clips of all prompts after each other: [P K, 3, F, H, W]."""
        return self.clips.flatten(0, 1)

    @property
    def all_latents(self) -> Tensor:
        """The latents of all prompts after each other: [P K, C, T, H, W]."""
        return self.latents.flatten(0, 1)

    def by_prompt(self, values: Tensor) -> Tensor:
        """Divide ``values`` [P K, ...] of all clips into those of each prompt: [P, K, ...]."""
        return values.unflatten(0, self.clips.shape[:2])


@frozen(eq=False, kw_only=True)
class MetricParts:
    """What a metric may build upon.

    Attributes:
        inputs: as the plugin saw them.
        clip_shape: (3, F, H, W) of the run's clips.
        device: where the run's models compute; a network of a metric may go there.
        real: real clips to compare with; None without ``inputs.real_latents``. As many as an entry
            has are kept out of them, and measured as an entry is.
        shared: values that several metrics need, as loaded networks.
    """

    inputs: MetricInputs
    clip_shape: tuple[int, int, int, int]
    device: torch.device
    real: RealClips | None = None
    shared: Shared = field(factory=Shared)


class Metric(ABC):
    """Measures entries of a report, one after the other. Draws no random numbers of a run."""

    @abstractmethod
    def measure(self, samples: Samples) -> Mapping[str, Tensor]:
        """Return rows of this process's prompts, by any names: tensors [P, ...].

        Names, types and shapes behind P are the same on all processes. The last prompt may be
        there twice (``RowPartition``); its second row is dropped.

        Raises:
            ValueError: these clips cannot be measured, for instance because of their size.
        """

    @abstractmethod
    def combine(self, rows: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Return the numbers, finite, by their names, from the rows of all prompts in their order.

        Called on the first process alone.
        """

    def check(self, blank: Samples) -> None:
        """Raise ValueError now where ``measure`` would after the training; ``blank`` is one black
        clip, twice, in the size of the run's."""
        self.measure(blank)
