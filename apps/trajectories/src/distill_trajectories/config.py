"""The section ``trajectories`` of a file. No torch here: files are checked without it."""

from __future__ import annotations

import itertools
from typing import Literal

from attrs import field, frozen
from attrs.validators import in_, optional
from distill_conditioning.format import SAME_TIME
from distill_protocols import SamplerSpec
from distill_protocols.validators import at_least


def _of_the_ode(_config: object, _: object, value: SamplerSpec) -> None:
    if value.stochastic:
        raise ValueError(
            "stochastic: true draws fresh noise at each step, so no state of a trajectory would "
            "determine the clip that a student is to predict from it. Leave it out"
        )
    if value.solver != "euler":
        raise ValueError(
            f"solver {value.solver} corrects each state after the call at it, so no state of its "
            "trajectory alone determines the clip. Use solver: euler"
        )


def _not_empty(_config: object, _: object, value: str) -> None:
    if not value.strip():
        raise ValueError(f"{value!r} must name a folder")


@frozen(kw_only=True)
class TrajectoriesConfig:
    """Which clips of the teacher, by which sampler, and which states of them are kept.

    Attributes:
        output_dir: folder of the data set; a folder that was begun with the same section goes on.
        sampler: how the teacher samples, guidance included.
        keep_times: levels t to keep: those that the student will be sampled at. Each must be one
            of the sampler's.
        keep_steps: instead of them, numbers of the sampler's steps, from 0; x_t before each.
        seed: of the noise. A sample's noise is a function of it and of the sample's number.
        repeats: clips of each sample of the data set (its caption, and its picture, if any).
        limit: stop after so many clips; None: all. They go through the data set in its order, and
            through it again for each repeat. More later extends the same folder.
        batch_size: clips that are sampled together.
        samples_per_shard: clips in a file. A killed process loses at most what it has of one.
        dtype: of the stored latents and states. float16 rounds by 5e-4 of a value.
        cpu_threads: threads of torch on the CPU; None: as torch chooses.
    """

    output_dir: str = field(validator=_not_empty, metadata={"path": ()})
    sampler: SamplerSpec = field(validator=_of_the_ode)
    keep_times: tuple[float, ...] = field(default=())
    keep_steps: tuple[int, ...] = field(default=())
    seed: int = 0
    repeats: int = field(default=1, validator=at_least(1, "no clip would be made"))
    limit: int | None = field(
        default=None, validator=optional(at_least(1, "no clip would be made; leave it out for all"))
    )
    batch_size: int = field(default=1, validator=at_least(1, "clips are made together or alone"))
    samples_per_shard: int = field(default=64, validator=at_least(1, "a file holds a clip"))
    dtype: Literal["float16", "bfloat16", "float32"] = field(
        default="float16", validator=in_(("float16", "bfloat16", "float32"))
    )
    cpu_threads: int | None = field(
        default=None, validator=optional(at_least(1, "leave it out for torch's choice"))
    )

    @keep_times.validator
    def _check_times(self, attribute: object, value: tuple[float, ...]) -> None:
        if not value:
            return
        if not all(a > b for a, b in itertools.pairwise(value)):
            raise ValueError(f"{list(value)} must fall strictly, from noise to clip")
        levels = [1000 * sigma for sigma in self.sampler.sigmas()]
        for time in value:
            nearest = min(levels, key=lambda level: abs(level - time))
            if not abs(nearest - time) <= SAME_TIME:  # nan is no level
                raise ValueError(
                    f"{time:g} is no level of the sampler, which passes {nearest:g} "
                    f"(step {levels.index(nearest)}) nearest to it; what is kept is what it really "
                    "passes through. Write that, or choose steps, shift or timesteps that pass it"
                )

    @keep_steps.validator
    def _check_steps(self, attribute: object, value: tuple[int, ...]) -> None:
        if bool(value) == bool(self.keep_times):
            raise ValueError(
                f"{list(value)} beside keep_times {list(self.keep_times)}: one of the two states "
                "what is kept. Write one"
            )
        if not value:
            return
        rises = all(a < b for a, b in itertools.pairwise(value))
        if not rises or not value[0] >= 0 or not value[-1] < self.sampler.steps:
            raise ValueError(
                f"{list(value)} must rise within 0 .. {self.sampler.steps - 1}, the steps of the "
                "sampler. The end (CausVid's index -1) is the clip itself and always stored"
            )

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers of the sampler's steps whose x_t is kept."""
        levels = [1000 * sigma for sigma in self.sampler.sigmas()]
        nearest = (
            min(range(len(levels)), key=lambda i: abs(levels[i] - time)) for time in self.keep_times
        )
        return self.keep_steps or tuple(nearest)

    @property
    def times(self) -> tuple[float, ...]:
        """Levels t that are kept, as the sampler passes them."""
        return tuple(1000 * self.sampler.sigmas()[step] for step in self.steps)

    def samples(self, of: int) -> int:
        """Count how many clips there will be, of a data set of so many samples."""
        return min(self.repeats * of, self.limit or self.repeats * of)
