"""CausVid as a training method: distribution matching of a causal student's denoised data."""

from __future__ import annotations

from distill_protocols import Batch, ConditioningProvider, ModelBundle, RandomStreams, StepResult

from distill_methods.causvid.config import CausVidConfig
from distill_methods.contracts import LatentDiffusion
from distill_methods.distribution_matching.matching import DistributionMatching
from distill_methods.latent_method import LatentMethod
from distill_methods.rollouts import StudentRollouts


class CausVidMethod(LatentMethod[CausVidConfig]):
    """A causal student denoises data whose chunks have noise levels of their own (CausVid, Yin et
    al. 2025, arXiv:2412.07772, section 4.2)::

        x_t = (1 - s) x_data + s eps,  t of each chunk one of the sampler's levels
        x   = G(x_t, t)                one call, block-causal: a chunk sees itself and those before
        loss: distribution matching of x, by a teacher and a critic that see whole clips

    ``DistributionMatching`` has the losses and the outputs. Gradient goes through the whole call:
    a chunk's loss also trains how the chunks before it are read.

    Deviations from tianweiy/CausVid: those of ``DMD2Method``; and if the student has two experts,
    an iteration's chunks are at the levels of one expert (and clean only if that one has t = 0).

    Args:
        bundle: causal student and critic, both trainable, and the frozen teachers.
        conditioning: gives the negative condition, unless no teacher is guided.

    Raises:
        RoleError: a role is missing, a teacher is trainable, or student or critic is not.
        CapabilityError: the adapter lacks something in ``config.capabilities``.
        ConditioningError: a teacher is guided and there is no negative condition.
    """

    name = "causvid"

    def __init__(
        self,
        bundle: ModelBundle,
        adapter: LatentDiffusion,
        config: CausVidConfig,
        *,
        conditioning: ConditioningProvider,
        streams: RandomStreams | None = None,
    ) -> None:
        super().__init__(bundle, adapter, config, conditioning=conditioning, streams=streams)
        rollout = StudentRollouts(
            self.context,
            config,
            "data",
            per_chunk=True,
            with_clean=config.clean_chunks,
        )
        self._matching = DistributionMatching(self.context, config, rollout)

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """See ``DistributionMatching.step``."""
        return self._matching.step(batch, iteration)
