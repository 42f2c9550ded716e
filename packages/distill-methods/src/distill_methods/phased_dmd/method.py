"""Phased DMD as a training method: distribution matching by phases of noise levels."""

from __future__ import annotations

from distill_protocols import Batch, ConditioningProvider, ModelBundle, RandomStreams, StepResult

from distill_methods.contracts import LatentDiffusion
from distill_methods.distribution_matching.additions import WholeClipAdditions
from distill_methods.distribution_matching.matching import DistributionMatching
from distill_methods.latent_method import LatentMethod
from distill_methods.phased_dmd.config import PhasedDMDConfig
from distill_methods.phased_dmd.phases import PhasedRollouts, PhaseNoising, find_phases


class PhasedDMDMethod(LatentMethod[PhasedDMDConfig]):
    """Phased DMD (arXiv:2510.27684) of a student, a critic and teachers of two experts each.

    The student is a chain of two: the expert for high noise levels takes noise to x_b at s_b, the
    noise level of the other one's first step, which takes x_b to a clip. Each is matched in its own
    phase, by the same losses (``DistributionMatching``)::

        high:  x_b = x_k + (s_b - s_k) v_student(x_k, s_k)
               x_t = a x_b + beta eps,  a = (1 - s) / (1 - s_b),  beta^2 = s^2 - a^2 s_b^2,  s > s_b
               L_critic = mean |v_critic(x_t) - phase_velocity(x_b, eps, t, t_b)|^2
        low:   x_t = (1 - s) x + s eps,  s <= s_b                       x a clip of the whole chain

    So the high-noise expert is never asked for a sharp clip, which it does not make, and a clip is
    never pulled to the mean of what its layout leaves open. L_dmd is taken on the x0 that the call
    at s_k predicts in both phases, as in ModelTC/LightX2V@f8aee98b
    ``lightx2v_train/trainers/phased_dmd/rollout.py``; its normaliser and f, r are x0 too.

    Deviations from LightX2V, beside those of ``DMD2Method``:

    - The critic is trained on clips of all exit steps, as the student is; theirs always on those of
      the phase's last step.
    - The phase of an iteration is drawn with the shares of the exit steps; theirs takes turns.
    - In the low phase scores are taken at s <= s_b alone. Theirs takes every second of them at
      s > s_b by a third critic (``enable_fake_low_high``).
    - The normaliser has no lower limit (theirs 1e-4).
    - Their third loss, on real data with critics of its own (``fake_real_*``), is not there.

    ``outputs``: those of ``DistributionMatching``.

    Args:
        bundle: student and critic, both trainable, and the frozen teachers.
        conditioning: gives the negative condition, unless no teacher is guided.

    Raises:
        RoleError: a role is missing, a teacher is trainable, or student or critic is not.
        CapabilityError: the adapter lacks something in ``config.capabilities``.
        ConditioningError: a teacher is guided and there is no negative condition.
        ContractError: a role has one expert, a phase has no steps or no t for its scores; or as
            ``WholeClipAdditions``.
    """

    name = "phased_dmd"

    def __init__(
        self,
        bundle: ModelBundle,
        adapter: LatentDiffusion,
        config: PhasedDMDConfig,
        *,
        conditioning: ConditioningProvider,
        streams: RandomStreams | None = None,
    ) -> None:
        super().__init__(bundle, adapter, config, conditioning=conditioning, streams=streams)
        phases = find_phases(self.context, config)
        self._matching = DistributionMatching(
            self.context,
            config,
            PhasedRollouts(self.context, config, phases),
            noising=PhaseNoising(self.context, config, phases),
        )
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
