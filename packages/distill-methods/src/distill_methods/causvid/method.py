"""CausVid as a training method: its rollout. The rest is ``distribution_matching``."""

from __future__ import annotations

import torch
from distill_protocols import Batch, ConditioningProvider, ModelBundle, RandomStreams, StepResult

from distill_methods.causvid.config import CausVidConfig
from distill_methods.contracts import LatentDiffusion, chunks_of
from distill_methods.distribution_matching.matching import (
    DistributionMatching,
    Rollout,
    exit_levels,
)
from distill_methods.latent_method import LatentMethod
from distill_methods.maths import per_frame


class CausVidMethod(LatentMethod[CausVidConfig]):
    """A causal student learns on data whose chunks are noised each by itself (Yin et al. 2025,
    arXiv:2412.07772, section 4.2)::

        x_t = (1 - s) x_data + s eps,  t of each chunk one of the sampler's levels
        x   = G(x_t, t)                one call, block-causal: a chunk sees itself and those before
        loss: distribution matching of x, judged by models that see whole clips

    ``DistributionMatching`` has the losses and the outputs. Gradient goes through the whole call:
    a chunk's loss also teaches how those before it are read.

    Deviations from tianweiy/CausVid: those of ``DMD2Method``, and in a student of two experts an
    iteration's chunks are at the levels of one expert (and clean only if that one has t = 0).

    Args:
        bundle: causal student and critic, both trainable, and the frozen teachers.
        conditioning: gives the negative condition, unless no teacher is guided.

    Raises:
        RoleError: a role is missing, a teacher is trainable, or student or critic is not.
        CapabilityError: the adapter lacks something in ``config.capabilities``.
        ConditioningError: a teacher is guided and there is no negative condition.
    """

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
        self._matching = DistributionMatching(
            "causvid", bundle, adapter, config, draws=self.draws, negative=self.negative
        )
        # Here once, as copying them in each step would make the host wait for the device.
        levels = [1000 * sigma for sigma in (*config.student_sampler.sigmas(), 0.0)]
        self._levels = torch.tensor(levels).to(self._device())

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """``dmd_loss`` in the student's turn, ``critic_loss`` in the critic's, and their sum."""
        return self._matching.step(batch, iteration, self._rollout)

    def _rollout(self, batch: Batch, turn: str, iteration: int) -> Rollout:
        purpose = f"causvid.{turn}"
        among = exit_levels(
            self.draws, self.config, purpose, iteration, clean=self.config.clean_chunks
        )
        frames = [chunk.frames for chunk in chunks_of(self.adapter, "student")]
        drawn = self.streams.rows(f"{purpose}.data_step", len(batch)).integers(
            len(among), (len(frames),)
        )
        steps = torch.tensor(among, device=drawn.device)[drawn].to(batch.latents.device)
        t = per_frame(self._levels[steps], frames)
        noise = self.draws.noise_like(batch.latents, f"{purpose}.data_noise")
        x_t = self.adapter.add_noise(self.adapter.normalize_latents(batch.latents), noise, t)
        x0 = self.adapter.forward("student", x_t, t, batch.cond, fwd_pred_type="x0")
        return Rollout(x0, steps.float().mean(dim=1))
