"""DMD2 as a training method: distribution matching of rollouts from noise or from data."""

from __future__ import annotations

from distill_protocols import Batch, ConditioningProvider, ModelBundle, RandomStreams, StepResult

from distill_methods.contracts import LatentDiffusion
from distill_methods.distribution_matching.additions import WholeClipAdditions
from distill_methods.distribution_matching.matching import DistributionMatching
from distill_methods.dmd2.config import DMD2Config
from distill_methods.dmd2.decoupled import DecoupledTeachers
from distill_methods.latent_method import LatentMethod
from distill_methods.rollouts import StudentRollouts


class DMD2Method(LatentMethod[DMD2Config]):
    """DMD2 (Yin et al. 2024, arXiv:2405.14867).

    The student is called once with gradient, at one of its sampler's steps::

        x = G(x_in, t_k)

    and is trained by ``DistributionMatching``, which has the losses and the outputs, with what
    ``WholeClipAdditions`` adds where it is asked for. x_in is the
    student's own sampling from noise up to step k (section 4.5, backward simulation), or noised
    data.

    Where the public codes disagree, and what is done here:

    - The critic's clips come from a rollout of their own, with fresh noise (Self-Forcing,
      CausVid, FastVideo). tianweiy/DMD2 gives the critic the very clips of the student's turn.
    - The normaliser is per sample (all but FastVideo, which averages over the batch).
    - t is per sample (Self-Forcing and FastVideo draw one for the batch).
    - With ``rollout: simulate`` the exit step k (the sampler's step whose call is trained) is one
      for the batch and all ranks, drawn for each micro batch; with ``rollout: data`` it is per
      sample.
      The calls that sampling would still make after k are never made (FastVideo makes them all and
      discards them).
    - If a model has two experts, an iteration takes the student at the steps of one of them, and
      computes the scores at the t of one. Which one is drawn for the iteration, with their shares
      as probabilities.
    - The critic is conditional only; it is never guided.
    - The GAN (``gan``) is off unless asked for; ``Adversary`` describes it.
    - The critic's loss is on v (Self-Forcing and FastVideo; tianweiy/DMD2 on eps).

    Args:
        bundle: student and critic, both trainable, and the frozen teachers.
        conditioning: gives the negative condition, unless no teacher is guided.

    Raises:
        RoleError: a role is missing, a teacher is trainable, or student or critic is not.
        CapabilityError: the adapter lacks something in ``config.capabilities``.
        ConditioningError: a teacher is guided and there is no negative condition.
        ContractError: an anchor or an interpolated critic of a causal student; or a critic whose
            weights are not those of the student, to interpolate; or no t for decoupled guidance.
    """

    name = "dmd2"

    def __init__(
        self,
        bundle: ModelBundle,
        adapter: LatentDiffusion,
        config: DMD2Config,
        *,
        conditioning: ConditioningProvider,
        streams: RandomStreams | None = None,
    ) -> None:
        super().__init__(bundle, adapter, config, conditioning=conditioning, streams=streams)
        rollout = StudentRollouts(self.context, config, config.rollout)
        teachers = DecoupledTeachers(self.context, config) if config.decoupled else None
        self._matching = DistributionMatching(self.context, config, rollout, teachers=teachers)
        self._additions = WholeClipAdditions(self.context, config)

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """See ``DistributionMatching.step`` and ``WholeClipAdditions.add_to_step``."""
        matched = self._matching.step(batch, iteration)
        return self._additions.add_to_step(matched, batch, iteration)

    def optimizers_schedulers_step(self, iteration: int) -> tuple[str, ...]:
        """See ``DistillMethod.optimizers_schedulers_step``; the critic follows the student."""
        stepped = super().optimizers_schedulers_step(iteration)
        self._additions.after_update(stepped)
        return stepped
