"""rCM as a training method: the sum of a consistency loss and distribution matching."""

from __future__ import annotations

from distill_protocols import Batch, ConditioningProvider, ModelBundle, RandomStreams, StepResult

from distill_methods.consistency.losses import build_consistency_loss
from distill_methods.contracts import LatentDiffusion
from distill_methods.distribution_matching.matching import DistributionMatching
from distill_methods.latent_method import LatentMethod
from distill_methods.rcm.config import RCMConfig
from distill_methods.rollouts import StudentRollouts
from distill_methods.teachers.ensemble import Teachers


class RCMMethod(LatentMethod[RCMConfig]):
    """Score-regularized consistency (rCM, Zheng et al. 2025, arXiv:2510.08431).

    ::

        L_student = L_dmd + consistency_weight L_consistency

    Consistency is computed on data and covers all of them (a forward divergence, which keeps
    diversity); distribution matching is computed on the student's own clips and improves their
    quality (a reverse divergence). The losses are those of ``ContinuousConsistency`` (or
    ``DiscreteConsistency``) and ``DistributionMatching``; the critic's turn is DMD2's.

    Deviations from NVlabs/rcm, beside those of ``ConsistencyMethod`` and ``DMD2Method``:

    - Both graphs of the student are in memory at once; theirs are differentiated one after the
      other.
    - The warmup of consistency alone is an option of its own (``consistency_warmup``), and that of
      the tangent counts the student's updates; theirs is one number.
    - The student's clips exit at a random step of the sampler; theirs at random times, or after 1
      to 4 fixed ones.

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

    name = "rcm"

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
        rollout = StudentRollouts(self.context, config, config.rollout)
        self._matching = DistributionMatching(self.context, config, rollout)
        self._consistency_loss = build_consistency_loss(
            self.context.named("rcm.consistency"),
            config.form,
            teachers=Teachers(self.context, config),
            update_of=config.student_updates,
        )

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """Compute ``dmd_loss`` and ``consistency_loss`` (without its weight) in the student's turn,
        ``critic_loss`` in the critic's; ``total_loss`` is the sum."""
        if iteration <= self.config.consistency_warmup:
            loss, outputs = self._consistency_loss(batch, iteration)
            total_loss = self.config.consistency_weight * loss
            return StepResult({"total_loss": total_loss, "consistency_loss": loss}, outputs)
        losses, outputs = self._matching.step(batch, iteration)
        if "student" not in self.config.turns(iteration):
            return StepResult(losses, outputs)
        loss, consistency_outputs = self._consistency_loss(batch, iteration)
        # Its metrics alone: the clips in the outputs are those that are matched.
        metrics = {name: value for name, value in consistency_outputs.items() if value.ndim == 0}
        total_loss = losses["total_loss"] + self.config.consistency_weight * loss
        return StepResult(
            losses | {"total_loss": total_loss, "consistency_loss": loss}, outputs | metrics
        )
