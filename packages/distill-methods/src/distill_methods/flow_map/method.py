"""Flow maps as a training method: the loss of ``losses.py``."""

from __future__ import annotations

from distill_protocols import Batch, ConditioningProvider, ModelBundle, RandomStreams, StepResult

from distill_methods.contracts import LatentDiffusion
from distill_methods.flow_map.config import FlowMapConfig
from distill_methods.flow_map.losses import FlowMapLoss
from distill_methods.latent_method import LatentMethod
from distill_methods.teachers.ensemble import Teachers


class FlowMapMethod(LatentMethod[FlowMapConfig]):
    """One student that is sampled in any number of steps (AnyFlow, arXiv:2605.13724, first stage;
    MeanFlow, Geng et al. 2025, arXiv:2505.13447), by ``FlowMapLoss``.

    ``outputs``: ``flow_map_error`` and ``derivative_rms``.

    Args:
        bundle: a trainable student with a second time embedder, and the frozen teachers, if any.
        conditioning: gives the negative condition, unless nothing is guided.

    Raises:
        RoleError: a role is missing, a teacher is trainable, or the student is not.
        CapabilityError: the adapter lacks something in ``config.capabilities``.
        ConditioningError: the velocity is guided and there is no negative condition.
    """

    name = "flow_map"

    def __init__(
        self,
        bundle: ModelBundle,
        adapter: LatentDiffusion,
        config: FlowMapConfig,
        *,
        conditioning: ConditioningProvider,
        streams: RandomStreams | None = None,
    ) -> None:
        super().__init__(bundle, adapter, config, conditioning=conditioning, streams=streams)
        has_teachers = config.flow_map.velocity == "teacher"
        self._loss = FlowMapLoss(
            self.context,
            config.flow_map,
            teachers=Teachers(self.context, config) if has_teachers else None,
        )

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """Compute the loss of average velocities of one micro batch."""
        loss, outputs = self._loss(batch, iteration)
        return StepResult({"total_loss": loss}, outputs)
