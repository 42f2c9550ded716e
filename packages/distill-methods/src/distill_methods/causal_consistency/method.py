"""Causal consistency distillation as a training method."""

from __future__ import annotations

from distill_protocols import (
    Batch,
    CleanPast,
    ConditioningProvider,
    Latents,
    ModelBundle,
    RandomStreams,
    StepResult,
    one_tensor,
)

from distill_methods.causal_consistency.config import CausalConsistencyConfig
from distill_methods.consistency.losses import DiscreteConsistency
from distill_methods.contracts import LatentDiffusion
from distill_methods.latent_method import LatentMethod
from distill_methods.teachers.ensemble import Teachers


class CausalConsistencyMethod(LatentMethod[CausalConsistencyConfig]):
    """A causal student predicts in one call where the trajectory of its causal teacher ends, chunk
    by chunk after a clean past (Causal-Forcing, arXiv:2602.02214; FastVideo ``causal_cd``)::

        t = t_n of the grid, t' = t_{n+1} (0 beyond its end), per sample
        x_t  = (1 - s) x0 + s eps
        x_t' = x_t - (s - s') v_T,   v_T = u + w (c - u) of the frozen teacher
        L    = mean |x_t - s v - stop(x_t' - s' v_ema)|^2

    v, v_T and v_ema are of one call each on a whole clip, whose chunks see the clean clip before
    them (``CleanPast``). So a chunk's target is a function of what the chunk is given, which that
    of a bidirectional teacher is not: its trajectory's end depends on later chunks.

    ``DiscreteConsistency`` has the loss. Deviations from FastVideo's ``causal_cd.py``:

    - t is per sample (there one for the batch), and the pair that ends at data is among those drawn
      (there it is not): it alone ties the targets to the data.
    - The average is in fp32 and belongs to the run (``callbacks.ema``), and before its first update
      it is the student as it is (there the weights that the run began with).

    ``outputs``: ``student_x0`` and ``target_x0``.

    Args:
        bundle: a trainable causal student and the frozen causal teachers.
        conditioning: gives the negative condition, unless no teacher is guided.

    Raises:
        RoleError: a role is missing, a teacher is trainable, or the student is not; in a step:
            ``target: ema``, and nobody keeps an average.
        CapabilityError: the adapter lacks something in ``config.capabilities``.
        ConditioningError: a teacher is guided and there is no negative condition.
        ContractError: the student has the expert for high noise levels alone, or a guidance is of
            a second expert that no teacher has.
    """

    name = "causal_consistency"

    def __init__(
        self,
        bundle: ModelBundle,
        adapter: LatentDiffusion,
        config: CausalConsistencyConfig,
        *,
        conditioning: ConditioningProvider,
        streams: RandomStreams | None = None,
    ) -> None:
        super().__init__(bundle, adapter, config, conditioning=conditioning, streams=streams)
        self._loss = DiscreteConsistency(
            self.context,
            config.discrete,
            teachers=Teachers(self.context, config),
            past_of=self._clean_past,
            averaged_target=config.target == "ema",
        )

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """Compute the consistency loss of one micro batch."""
        loss, outputs = self._loss(batch, iteration)
        return StepResult({"total_loss": loss}, outputs)

    def _clean_past(self, x0: Latents) -> CleanPast:
        context_noise = self.config.student_sampler.context_noise
        return self.noise.clean_past(one_tensor(x0), f"{self.name}.past", context_noise)
