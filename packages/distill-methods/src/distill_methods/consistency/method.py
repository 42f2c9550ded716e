"""Consistency distillation as a training method: one of the two losses of ``losses.py``."""

from __future__ import annotations

from distill_protocols import Batch, ConditioningProvider, ModelBundle, RandomStreams, StepResult

from distill_methods.consistency.config import ConsistencyConfig
from distill_methods.consistency.losses import build_consistency_loss
from distill_methods.contracts import LatentDiffusion
from distill_methods.latent_method import LatentMethod
from distill_methods.teachers.ensemble import Teachers


class ConsistencyMethod(LatentMethod[ConsistencyConfig]):
    """The student predicts in one call where the guided teacher's trajectory ends.

    Consistency distillation (Song et al. 2023, arXiv:2303.01469), by ``DiscreteConsistency`` (LCM,
    Luo et al. 2023, arXiv:2310.04378) or ``ContinuousConsistency`` (sCM, Lu & Song 2024,
    arXiv:2410.11081), whose docstrings have the equations.

    Deviations:

    - The target comes from the student itself, without gradient, and not from an average of its
      weights: iCT (Song & Dhariwal 2023, section 3.2) drops the average, and so do sCM and rCM;
      LCM has one.
    - w is fixed; LCM draws it and gives it to the student as an input.
    - The solver is Euler's; LCM's DDIM is the same in the variables of flow matching.
    - sCM's learned weight of t is left out, as in rCM.

    ``outputs``: ``student_x0``, with ``target_x0`` (discrete), or ``teacher_x0`` and
    ``tangent_rms`` (continuous).

    Args:
        bundle: a trainable student and the frozen teachers.
        conditioning: gives the negative condition, unless no teacher is guided.

    Raises:
        RoleError: a role is missing, a teacher is trainable, or the student is not.
        CapabilityError: the adapter lacks something in ``config.capabilities``.
        ConditioningError: a teacher is guided and there is no negative condition.
        ContractError: continuous with a student of two experts, or a guidance of a second expert
            that no teacher has.
    """

    name = "consistency"

    def __init__(
        self,
        bundle: ModelBundle,
        adapter: LatentDiffusion,
        config: ConsistencyConfig,
        *,
        conditioning: ConditioningProvider,
        streams: RandomStreams | None = None,
    ) -> None:
        super().__init__(bundle, adapter, config, conditioning=conditioning, streams=streams)
        self._loss = build_consistency_loss(
            self.context,
            config.form,
            teachers=Teachers(self.context, config),
            update_of=lambda iteration: iteration,  # The student steps in every iteration.
        )

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """Compute the consistency loss of one micro batch."""
        loss, outputs = self._loss(batch, iteration)
        return StepResult({"total_loss": loss}, outputs)
