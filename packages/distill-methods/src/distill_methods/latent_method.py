"""The base class of the methods of this package: it derives what the config describes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

from distill_protocols import (
    Batch,
    Condition,
    ConditioningProvider,
    Latents,
    LatentsT,
    ModelBundle,
    RandomStreams,
    SamplerSpec,
    SampleView,
    SeveralNegatives,
    map_latents,
)
from distill_runtime import DistillMethod
from torch import Tensor
from torch.optim import Optimizer

from distill_methods.context import MethodContext
from distill_methods.contracts import LatentDiffusion
from distill_methods.latent_config import LatentMethodConfig
from distill_methods.noise_sampler import NoiseSampler
from distill_methods.validation_sampling import ViewSampler

ConfigT = TypeVar("ConfigT", bound=LatentMethodConfig)


class LatentMethod(DistillMethod[LatentDiffusion], Generic[ConfigT]):
    """A method that is described by its config: roles, update schedule, capabilities, sampler.

    It holds no algorithm. A subclass states ``name``, builds its parts from ``self.context`` and
    writes ``single_train_step``.

    Args:
        conditioning: gives the negative condition, unless nothing is guided, or guidance is
            an input of the models (``Capabilities.embeds_guidance``).

    Raises:
        RoleError: a role is missing, or trainable (or frozen) where it must not be.
        CapabilityError: the adapter lacks something in ``config.capabilities``.
        ConditioningError: something is guided and there is no negative condition: known now
            rather than in the middle of the run.
    """

    name: ClassVar[str]
    """As run files call it; the purposes of its random streams begin with it."""

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
        self.check_capabilities(config.capabilities)
        self.config = config
        self.conditioning = conditioning
        self.noise = NoiseSampler(adapter, self.streams)
        guided = config.needs_negative and not adapter.capabilities.embeds_guidance
        negative = _negatives(conditioning).to(self._device()) if guided else None
        self.context = MethodContext(
            name=self.name,
            bundle=bundle,
            adapter=adapter,
            noise=self.noise,
            negative=negative,
            device=self._device(),
            # Looked up at each call, because a trainer gives each run a stop flag of its own, and
            # each step the end of its turns.
            poll=lambda: self.stop.poll(),
            end_turn=lambda losses: self.end_turn(losses),
        )
        self.views = ViewSampler(
            adapter=adapter,
            bundle=bundle,
            default_spec=config.student_sampler,
            conditioning=conditioning,
            poll=self.context.poll,
        )

    def get_optimizers(self, iteration: int) -> dict[str, Optimizer]:
        """Return the optimizers of the roles that ``config.turns`` names."""
        return self.optimizers_of(*self.config.turns(iteration))

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
        return self.views.sample_clips(views, cond, seed=seed, rows=rows)

    def sample_latents(
        self, view: SampleView, cond: Condition, *, seed: int, rows: Sequence[int]
    ) -> Latents:
        return self.views.sample_latents(view, cond, seed=seed, rows=rows)

    def decode_latents(self, latents: Latents) -> Tensor:
        self.stop.poll()
        device = self.context.device
        return self.adapter.decode(map_latents(lambda tensor: tensor.to(device), latents))

    def predict_latents(
        self,
        role: str,
        latents: LatentsT,
        t: float,
        cond: Condition,
        *,
        seed: int,
        rows: Sequence[int],
    ) -> LatentsT:
        return self.views.predict_latents(role, latents, t, cond, seed=seed, rows=rows)


def _negatives(conditioning: ConditioningProvider) -> Condition:
    if isinstance(conditioning, SeveralNegatives):
        return conditioning.negatives()
    return conditioning.negative()
