"""Flow maps on their own clips as a training method."""

from __future__ import annotations

import itertools

import torch
from distill_protocols import (
    Batch,
    ConditioningProvider,
    ModelBundle,
    RandomStreams,
    SamplerSpec,
    StepResult,
    one_tensor,
)

from distill_methods.context import MethodContext
from distill_methods.contracts import LatentDiffusion, require_contract
from distill_methods.distribution_matching.matching import DistributionMatching
from distill_methods.flow_map.losses import FlowMapLoss
from distill_methods.flow_map_dmd.config import FlowMapDMDConfig
from distill_methods.latent_method import LatentMethod
from distill_methods.rollouts import Rollout
from distill_methods.teachers.ensemble import Teachers


class FlowMapRollouts:
    """Clips of a flow map (AnyFlow, arXiv:2605.13724; NVlabs/AnyFlow,
    ``far/pipelines/pipeline_wan_anyflow.py``, ``training_rollout``).

    Of N steps t_0 = 1000, ..., t_N = 0 one is drawn, and three calls walk
    ``x_r = x_t - (s - s_r) u(x_t, t, r)``: from t_0 to t_k, from t_k to t_{k+1}, and from there to
    0. All of them have a gradient. N and k are one for the micro batch and all ranks, as they
    decide which calls are made.
    """

    def __init__(self, context: MethodContext, config: FlowMapDMDConfig) -> None:
        self._context = context
        self._config = config
        self._maps = require_contract(
            context.adapter.flow_maps, "supports_flow_maps", by=context.name
        )

    def __call__(self, batch: Batch, turn: str, iteration: int) -> Rollout:
        """See ``RolloutFunction``."""
        context, config = self._context, self._config
        purpose = f"{context.name}.{turn}"
        choice = context.noise.sample_shared_integer(f"{purpose}.steps", len(config.rollout_steps))
        steps = config.rollout_steps[choice]
        k = context.noise.sample_shared_integer(f"{purpose}.exit_step", steps)
        spec = SamplerSpec(steps=steps, shift=config.student_sampler.shift)
        levels = (*(1000 * sigma for sigma in spec.sigmas()), 0.0)
        x = one_tensor(context.noise.clip_noise(batch, f"{purpose}.rollout"))
        path = (levels[0], levels[k], levels[k + 1], 0.0)
        for t, target_t in itertools.pairwise(path):
            if t == target_t:  # the drawn step is the first or the last
                continue
            context.poll()
            times = torch.full((len(x), 2), t, device=x.device)
            times[:, 1] = target_t
            average = self._maps.forward_to("student", x, times[:, 0], times[:, 1], batch.cond)
            x = x - (t - target_t) / 1000 * average
        exit_steps = torch.full((len(x),), k, device=x.device)
        return Rollout(x, exit_steps, torch.tensor([[k]]), same_on_all_ranks=True)


class FlowMapDMDMethod(LatentMethod[FlowMapDMDConfig]):
    """Distribution matching of a flow map's clips (AnyFlow, arXiv:2605.13724, second stage)::

        L_student = L_dmd + flow_map_weight L_flow_map
        L_critic  = DMD2's

    ``outputs``: those of ``DistributionMatching``; in the student's turn those of ``FlowMapLoss``
    as well.

    Args:
        bundle: a student with a second time embedder and a critic, both trainable, and the frozen
            teachers.
        conditioning: gives the negative condition, unless nothing is guided.

    Raises:
        RoleError: a role is missing, a teacher is trainable, or student or critic is not.
        CapabilityError: the adapter lacks something in ``config.capabilities``.
        ConditioningError: something is guided and there is no negative condition.
    """

    name = "flow_map_dmd"

    def __init__(
        self,
        bundle: ModelBundle,
        adapter: LatentDiffusion,
        config: FlowMapDMDConfig,
        *,
        conditioning: ConditioningProvider,
        streams: RandomStreams | None = None,
    ) -> None:
        super().__init__(bundle, adapter, config, conditioning=conditioning, streams=streams)
        rollout = FlowMapRollouts(self.context, config)
        self._matching = DistributionMatching(self.context, config, rollout)
        has_teachers = config.flow_map.velocity == "teacher"
        context = self.context.named("flow_map_dmd.flow_map")
        self._flow_map_loss = FlowMapLoss(
            context,
            config.flow_map,
            teachers=Teachers(context, config.guided_map) if has_teachers else None,
        )

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """Compute ``dmd_loss`` and ``flow_map_loss`` (without its weight) in the student's turn,
        ``critic_loss`` in the critic's; ``total_loss`` is the sum."""
        losses, outputs = self._matching.step(batch, iteration)
        weight = self.config.flow_map_weight
        if "student" not in self.config.turns(iteration) or weight == 0:
            return StepResult(losses, outputs)
        loss, metrics = self._flow_map_loss(batch, iteration)
        total_loss = losses["total_loss"] + weight * loss
        return StepResult(
            losses | {"total_loss": total_loss, "flow_map_loss": loss}, outputs | metrics
        )
