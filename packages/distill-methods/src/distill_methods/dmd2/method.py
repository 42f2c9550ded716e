"""DMD2 as a training method: its rollout. The rest is ``distribution_matching``."""

from __future__ import annotations

import torch
from distill_protocols import (
    Batch,
    ConditioningProvider,
    ModelBundle,
    RandomStreams,
    StepResult,
)

from distill_methods.contracts import LatentDiffusion
from distill_methods.distribution_matching.matching import (
    DistributionMatching,
    Rollout,
    exit_levels,
)
from distill_methods.dmd2.config import DMD2Config
from distill_methods.latent_method import LatentMethod


class DMD2Method(LatentMethod[DMD2Config]):
    """DMD2 without its optional GAN (Yin et al. 2024, arXiv:2405.14867).

    The student is called once with gradient, at one of its sampler's steps::

        x = G(x_in, t_k)

    and learns by ``DistributionMatching``, which has the losses and the outputs. x_in is the
    student's own sampling from noise up to step k (section 4.5, backward simulation), or noised
    data.

    Where the public codes disagree, and what is done here:

    - The critic's clips come from a rollout of their own, with fresh noise (Self-Forcing,
      CausVid, FastVideo). tianweiy/DMD2 gives the critic the very clips of the student's turn.
    - The normaliser is per sample (all but FastVideo, which averages over the batch).
    - t is per sample (Self-Forcing and FastVideo draw one for the batch).
    - With ``rollout: simulate`` the exit step k is one for the batch and all ranks, drawn for
      each micro batch; with ``rollout: data`` it is per sample. The calls that sampling would
      still make after k are never made (FastVideo makes them all and throws them away).
    - Of a model of two experts, an iteration takes the student at the steps of one of them, and
      judges at the t of one: which, is drawn for the iteration with their shares as chances.
    - The critic is conditional only; it is never guided.
    - The critic's loss is on v (Self-Forcing and FastVideo; tianweiy/DMD2 on eps).

    Args:
        bundle: student and critic, both trainable, and the frozen teachers.
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
        config: DMD2Config,
        *,
        conditioning: ConditioningProvider,
        streams: RandomStreams | None = None,
    ) -> None:
        super().__init__(bundle, adapter, config, conditioning=conditioning, streams=streams)
        self._matching = DistributionMatching(
            "dmd2", bundle, adapter, config, draws=self.draws, negative=self.negative
        )
        # Here once, as copying them in each step would make the host wait for the device.
        levels = [1000 * sigma for sigma in config.student_sampler.sigmas()]
        self._levels = torch.tensor(levels).to(self._device())

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """``dmd_loss`` in the student's turn, ``critic_loss`` in the critic's, and their sum."""
        return self._matching.step(batch, iteration, self._rollout)

    def _rollout(self, batch: Batch, turn: str, iteration: int) -> Rollout:
        """Every draw of a sample has rows of its own, so that micro batches and ranks see the
        numbers that one large batch would."""
        purpose, size = f"dmd2.{turn}", len(batch)
        among = exit_levels(self.draws, self.config, purpose, iteration)
        if self.config.rollout == "data":
            return self._from_data(batch, purpose, among)
        # Shared, or the ranks of a sharded student would wait for each other for ever.
        k = among[self.draws.shared_integer(f"{purpose}.exit_step", len(among))]
        x0 = self.adapter.rollout(
            "student",
            self.config.student_sampler,
            self.draws.noise_like(batch.latents, f"{purpose}.rollout"),
            batch.cond,
            exits=(k,) * len(self.adapter.chunks("student")),
            generators=self.streams.rows(f"{purpose}.rollout.fresh", size),
            poll=self.stop.poll,
        )
        return Rollout(x0, torch.full((size,), k, device=x0.device))

    def _from_data(self, batch: Batch, purpose: str, among: tuple[int, ...]) -> Rollout:
        drawn = self.streams.rows(f"{purpose}.data_step", len(batch)).integers(len(among))
        steps = torch.tensor(among, device=drawn.device)[drawn].to(batch.latents.device)
        noise = self.draws.noise_like(batch.latents, f"{purpose}.data_noise")
        latents = self.adapter.normalize_latents(batch.latents)
        t = self._levels[steps]
        x_t = self.adapter.add_noise(latents, noise, t)
        x0 = self.adapter.forward("student", x_t, t, batch.cond, fwd_pred_type="x0")
        return Rollout(x0, steps)
