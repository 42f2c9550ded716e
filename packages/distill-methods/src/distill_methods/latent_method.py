"""What every method of this package shares: latents come in, clips can be looked at."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from distill_protocols import (
    Batch,
    Condition,
    ConditioningProvider,
    DistillMethod,
    ModelBundle,
    RandomStreams,
    RowGenerators,
    SamplerSpec,
    SampleView,
)
from torch import Tensor
from torch.optim import Optimizer

from distill_methods.contracts import LatentDiffusion
from distill_methods.maths import sample_timesteps, timesteps_within
from distill_methods.sampling import sample_views
from distill_methods.time_ranges import Range, share
from distill_methods.time_sampling import TimeSampling


class MethodConfig(Protocol):
    """What a method's own section must be able to say."""

    @property
    def student_sampler(self) -> SamplerSpec: ...
    @property
    def guided(self) -> bool:
        """Whether a step or the student's sampler needs a negative condition."""
        ...

    @property
    def capabilities(self) -> tuple[str, ...]: ...
    def turns(self, iteration: int) -> tuple[str, ...]: ...


ConfigT = TypeVar("ConfigT", bound=MethodConfig)


class LatentMethod(DistillMethod[LatentDiffusion], Generic[ConfigT]):
    """No algorithm: the wiring between a method's config and the contracts.

    Args:
        bundle: the roles that the method names.
        conditioning: gives the negative condition, unless nothing is guided.

    Raises:
        RoleError: a role is missing, or trainable (or frozen) where it must not be.
        CapabilityError: the adapter lacks something in ``config.capabilities``.
        ConditioningError: something is guided and there is no negative condition: known now
            rather than in the middle of the run.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        adapter: LatentDiffusion,
        config: ConfigT,
        *,
        conditioning: ConditioningProvider,
        streams: RandomStreams | None = None,
    ) -> None:
        super().__init__(bundle, adapter, streams=streams)
        self.check_capabilities(config.capabilities)
        self.config = config
        self.conditioning = conditioning
        self._negative = conditioning.negative().to(self._device()) if config.guided else None

    def get_optimizers(self, iteration: int) -> dict[str, Optimizer]:
        """Those of the roles whose turn it is (``config.turns``)."""
        return self.optimizers_of(*self.config.turns(iteration))

    # -- for the steps ------------------------------------------------------------------------

    def times(
        self, purpose: str, count: int, iteration: int, time: TimeSampling, *roles: str
    ) -> Tensor:
        """t of a micro batch that all of ``roles`` can be called with: fp32 [B].

        Of a model with experts they lie in one range of t, the same for all micro batches and all
        ranks of an iteration; over the iterations they have the distribution of ``time``.
        """
        within = self.range_of(purpose, iteration, lambda r: share(time, *r), *roles)
        if within is None:
            return sample_timesteps(time, self.streams.rows(purpose, count))
        return timesteps_within(self.streams.rows(purpose, count).uniform(), time, within)

    def range_of(
        self, purpose: str, iteration: int, share_of: Callable[[Range], float], *roles: str
    ) -> Range | None:
        """The range of t within which ``iteration`` calls ``roles``; None where any t will do.

        Drawn with the shares as chances. It is a function of (seed, purpose, iteration) alone: the
        experts that are called must be the same on all ranks, and in all micro batches, so that
        one expert gets the gradient of the whole batch.
        """
        if not self.adapter.capabilities.supports_expert_routing:
            return None
        ranges = self.adapter.expert_ranges(*roles)
        if len(ranges) == 1:
            return None
        drawn = RowGenerators.seeded(self.streams.seed, f"{purpose}.range", [iteration]).uniform()
        ends = itertools.accumulate(map(share_of, ranges))
        found = bisect.bisect_right(list(ends), float(drawn))
        return ranges[min(found, len(ranges) - 1)]

    def trained_frames(self, cond: Condition) -> Tensor | None:
        """See ``ImageConditioning``; None where everything is predicted."""
        if not self.adapter.capabilities.supports_image_condition:
            return None
        return self.adapter.trained_frames(cond)

    # -- for the run --------------------------------------------------------------------------

    @property
    def sampler_spec(self) -> SamplerSpec:
        return self.config.student_sampler

    def batch_ids(self, batch: Batch) -> Sequence[str]:
        return batch.ids

    def sample_for_logging(
        self,
        views: Sequence[SampleView],
        cond: Condition,
        *,
        seed: int,
        rows: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        return sample_views(
            self.adapter,
            self.bundle,
            views,
            cond,
            default_spec=self.sampler_spec,
            conditioning=self.conditioning,
            seed=seed,
            rows=rows,
            poll=self.stop.poll,
        )
