"""Consistency distillation as a training method: one of the two losses of ``losses``."""

from __future__ import annotations

from distill_protocols import Batch, ConditioningProvider, ModelBundle, RandomStreams, StepResult

from distill_methods.consistency.config import ConsistencyConfig
from distill_methods.consistency.losses import consistency_loss
from distill_methods.contracts import LatentDiffusion
from distill_methods.latent_method import LatentMethod
from distill_methods.teaching import Teachers


class ConsistencyMethod(LatentMethod[ConsistencyConfig]):
    """The student gives in one call what the guided teacher's trajectory ends at.

    Consistency distillation (Song et al. 2023, arXiv:2303.01469), by ``DiscreteConsistency`` (LCM,
    Luo et al. 2023, arXiv:2310.04378) or ``ContinuousConsistency`` (sCM, Lu & Song 2024,
    arXiv:2410.11081), whose docstrings have the equations.

    Deviations: the target is the student's own, without gradient, and no average of it: iCT (Song &
    Dhariwal 2023, section 3.2) drops the average, and so do sCM and rCM; LCM has one. w is fixed
    (LCM draws it, and gives it to the student as an input). The solver is Euler's (LCM: DDIM, which
    is the same in the variables of flow matching). sCM's learned weight of t is left out (rCM).

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
        teachers = Teachers(adapter, config, draws=self.draws, negative=self.negative)
        self._loss = consistency_loss(
            "consistency",
            adapter,
            config.form,
            draws=self.draws,
            teachers=teachers,
            device=self._device(),
            update_of=lambda iteration: iteration,
        )

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """The consistency loss of one micro batch."""
        loss, outputs = self._loss(batch, iteration)
        return StepResult({"total_loss": loss}, outputs)
