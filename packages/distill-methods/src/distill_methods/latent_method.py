"""What every method of this package shares: latents come in, clips can be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from distill_protocols import (
    Batch,
    Condition,
    ConditioningProvider,
    ModelBundle,
    RandomStreams,
    SamplerSpec,
    SampleView,
)
from distill_runtime import DistillMethod
from torch import Tensor
from torch.optim import Optimizer

from distill_methods.contracts import LatentDiffusion
from distill_methods.draws import Draws
from distill_methods.latent_config import LatentMethodConfig
from distill_methods.sampling import sample_views

ConfigT = TypeVar("ConfigT", bound=LatentMethodConfig)


class LatentMethod(DistillMethod[LatentDiffusion], Generic[ConfigT]):
    """No algorithm: the wiring between a method's config and the contracts.

    Its roles are those of ``config.roles``.

    Args:
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
        self.required_roles = tuple(need.name for need in config.roles)
        self.trained_roles = tuple(need.name for need in config.roles if need.trainable)
        self.frozen_roles = tuple(need.name for need in config.roles if not need.trainable)
        bundle.require_roles(
            self.required_roles, why={need.name: need.reason for need in config.roles}
        )
        super().__init__(bundle, adapter, streams=streams)
        self.draws = Draws(adapter, self.streams)
        self.check_capabilities(config.capabilities)
        self.config = config
        self.conditioning = conditioning
        self.negative = (
            conditioning.negative().to(self._device()) if config.needs_negative else None
        )

    def get_optimizers(self, iteration: int) -> dict[str, Optimizer]:
        """Those of the roles whose turn it is (``config.turns``)."""
        return self.optimizers_of(*self.config.turns(iteration))

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
