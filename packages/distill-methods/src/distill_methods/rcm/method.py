"""rCM as a training method: two losses that stand by themselves, added."""

from __future__ import annotations

from distill_protocols import Batch, ConditioningProvider, ModelBundle, RandomStreams, StepResult

from distill_methods.consistency.losses import consistency_loss
from distill_methods.contracts import LatentDiffusion
from distill_methods.distribution_matching.matching import DistributionMatching
from distill_methods.latent_method import LatentMethod
from distill_methods.rcm.config import RCMConfig
from distill_methods.rollouts import StudentRollouts
from distill_methods.teaching import Teachers


class RCMMethod(LatentMethod[RCMConfig]):
    """Score-regularized consistency (rCM, Zheng et al. 2025, arXiv:2510.08431).

    ::

        L_student = L_dmd + consistency_weight L_consistency

    on data and on the student's own clips: consistency covers what the data hold (a forward
    divergence, which keeps diversity), distribution matching mends the quality of what the student
    makes (a reverse one). The losses are those of ``ContinuousConsistency`` (or
    ``DiscreteConsistency``) and ``DistributionMatching``; the critic's turn is DMD2's.

    Deviations from NVlabs/rcm: both graphs are there at once (theirs are differentiated one after
    the other); the student learns in every N-th iteration from the beginning, by both losses
    (theirs by consistency alone, in all iterations, during the warmup of the tangent, which counts
    the student's updates here); its clips are left at a random step of the sampler's times
    (theirs: at random times, or after 1 to 4 fixed ones); what concerns consistency alone
    (``ConsistencyMethod``) and matching alone (``DMD2Method``) is told there.

    ``outputs``: those of ``DistributionMatching``; in the student's turn ``tangent_rms`` as well.

    Args:
        bundle: student and critic, both trainable, and the frozen teachers.
        conditioning: gives the negative condition, unless no teacher is guided.

    Raises:
        RoleError: a role is missing, a teacher is trainable, or student or critic is not.
        CapabilityError: the adapter lacks something in ``config.capabilities``.
        ConditioningError: a teacher is guided and there is no negative condition.
        ContractError: continuous with a student of two experts, or a guidance of a second expert
            that no teacher has.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        adapter: LatentDiffusion,
        config: RCMConfig,
        *,
        conditioning: ConditioningProvider,
        streams: RandomStreams | None = None,
    ) -> None:
        super().__init__(bundle, adapter, config, conditioning=conditioning, streams=streams)
        self._matching = DistributionMatching(
            "rcm", bundle, adapter, config, draws=self.draws, negative=self.negative
        )
        self._rollout = StudentRollouts(
            "rcm",
            adapter,
            config,
            config.rollout,
            draws=self.draws,
            device=self._device(),
            poll=lambda: self.stop.poll(),
        )
        self._consistency = consistency_loss(
            "rcm.consistency",
            adapter,
            config.form,
            draws=self.draws,
            teachers=Teachers(adapter, config, draws=self.draws, negative=self.negative),
            device=self._device(),
            update_of=config.student_updates,
        )

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """``dmd_loss`` and ``consistency_loss`` (without its weight) in the student's turn,
        ``critic_loss`` in the critic's; ``total_loss`` is the sum."""
        losses, outputs = self._matching.step(batch, iteration, self._rollout)
        if "student" not in self.config.turns(iteration):
            return StepResult(losses, outputs)
        loss, told = self._consistency(batch, iteration)
        # Numbers alone: the clips that are shown are those that are matched.
        told = {name: value for name, value in told.items() if value.ndim == 0}
        total = losses["total_loss"] + self.config.consistency_weight * loss
        return StepResult(losses | {"total_loss": total, "consistency_loss": loss}, outputs | told)
