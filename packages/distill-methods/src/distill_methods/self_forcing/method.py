"""Self-Forcing as a training method: distribution matching of rollouts chunk by chunk."""

from __future__ import annotations

import torch
from distill_protocols import (
    Batch,
    Chunk,
    ConditioningProvider,
    ContractError,
    ModelBundle,
    RandomStreams,
    StepResult,
)

from distill_methods.contracts import LatentDiffusion, require_contract
from distill_methods.distribution_matching.matching import DistributionMatching
from distill_methods.latent_method import LatentMethod
from distill_methods.maths import standard_noise
from distill_methods.rollouts import Rollout, allowed_exit_steps
from distill_methods.self_forcing.config import (
    SelfForcingConfig,
    gradient_frames,
    rollout_lengths,
    rollout_problems,
)


class SelfForcingMethod(LatentMethod[SelfForcingConfig]):
    """A causal student is trained on videos that it makes chunk by chunk, from its own past (Huang
    et al. 2025, arXiv:2506.08009, algorithm 1)::

        for chunk i:
            z = eps_i
            for j < k: x = G(z, t_j, past); z = noise(x, t_j+1)     no gradient
            x_i = G(z, t_k, past)                                   with gradient
            past += G(noise(stop(x_i), t_context), t_context)       no gradient, not after the last
        loss: distribution matching of [x_0 x_1 ...], by a teacher and a critic that see whole clips

    ``DistributionMatching`` has the losses and the outputs. The past is detached, so a chunk's
    loss reaches the call that made it and nothing else, and a step keeps the graph of one call a
    chunk, however many steps the sampler has.

    Deviations from guandeh17/Self-Forcing:

    - Keys and values of the past never change: there they are overwritten in place, and with
      activation checkpointing a chunk's gradient leaks into others.
    - Context noise 0 is no noise at all (there a table lookup adds sigma 0.005 and calls it t = 0).
    - Nothing is stored after the last chunk, as nothing reads it.
    - If a rollout is longer than a clip, the first frame that the scores see stays as it is and
      out of the student's loss. There it is decoded and encoded again as a picture, and its whole
      chunk stays out.
    - t of the scores is per sample, and clips are noised with exactly that t. Its ``ts_schedule``,
      which bounds t by the exit step, is not built.
    - If the student has two experts, the chunks of an iteration exit at the steps of one of them,
      drawn with their shares as probabilities; earlier steps go to the expert of their t.

    Args:
        bundle: causal student and critic, both trainable, and the frozen teachers.
        conditioning: gives the negative condition, unless no teacher is guided.

    Raises:
        RoleError: a role is missing, a teacher is trainable, or student or critic is not.
        CapabilityError: the adapter lacks something in ``config.capabilities``.
        ConditioningError: a teacher is guided and there is no negative condition.
        ContractError: no rollout of ``config.rollout_frames`` is of whole chunks and as long as a
            clip, or ``config.gradient_frames`` does not hold a chunk.
    """

    name = "self_forcing"

    def __init__(
        self,
        bundle: ModelBundle,
        adapter: LatentDiffusion,
        config: SelfForcingConfig,
        *,
        conditioning: ConditioningProvider,
        streams: RandomStreams | None = None,
    ) -> None:
        super().__init__(bundle, adapter, config, conditioning=conditioning, streams=streams)
        self._causal = require_contract(adapter.causal, "supports_kv_cache", by=self.name)
        for problem in rollout_problems(config, self._divide, adapter.latent_shape[1]):
            raise ContractError(f"{'.'.join(problem.path)} {problem.message}")
        self._matching = DistributionMatching(self.context, config, self._rollout)

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """See ``DistributionMatching.step``."""
        return self._matching.step(batch, iteration)

    def _rollout(self, batch: Batch, turn: str, iteration: int) -> Rollout:
        """Make a video of the student chunk by chunk, and return its last clip."""
        purpose, size = f"{self.name}.{turn}", len(batch)
        channels, clip_frames, height, width = batch.latent_shape
        lengths = rollout_lengths(self.config, self._divide, clip_frames)
        # Length and exit steps decide how many calls there are. They are shared by all ranks, which
        # would otherwise wait for each other for ever; the noise is each sample's own.
        frames = lengths[self.noise.sample_shared_integer(f"{purpose}.length", len(lengths))]
        chunks = self._divide(frames)
        exit_steps = self._sample_exit_steps(purpose, iteration, len(chunks))
        with_gradient = gradient_frames(self.config, clip_frames)
        device = batch.device
        shape = (channels, frames, height, width)
        x0 = self.adapter.rollout(
            "student",
            self.config.student_sampler,
            standard_noise(shape, self.streams.rows(f"{purpose}.rollout", size), device),
            batch.cond,
            exit_steps=exit_steps,
            requires_grad=[chunk.first >= frames - with_gradient for chunk in chunks],
            generators=self.streams.rows(f"{purpose}.rollout.fresh", size),
            poll=self.context.poll,
        )
        mean_steps = torch.full((size,), sum(exit_steps) / len(exit_steps), device=device)
        exits = torch.tensor(
            [[k for k, chunk in zip(exit_steps, chunks, strict=True) for _ in range(chunk.frames)]]
        )
        if frames == clip_frames:
            return Rollout(x0, mean_steps, exits, same_on_all_ranks=True)
        # A video autoencoder codes the first frame of a clip as a picture, and the teacher expects
        # one there. The first frame of a later part is none: its score means nothing.
        loss_mask = torch.ones(1, 1, clip_frames, 1, 1, device=device)
        loss_mask[:, :, 0] = 0
        return Rollout(
            x0[:, :, -clip_frames:],
            mean_steps,
            exits[:, -clip_frames:],
            same_on_all_ranks=True,
            loss_mask=loss_mask,
        )

    def _divide(self, frames: int) -> tuple[Chunk, ...]:
        return self._causal.chunks("student", frames)

    def _sample_exit_steps(self, purpose: str, iteration: int, chunks: int) -> tuple[int, ...]:
        """Draw the exit step of each chunk, or one for all of them."""
        if self.config.always_exits_last:
            return (self.config.student_sampler.steps - 1,) * chunks
        allowed = allowed_exit_steps(self.context, self.config, purpose, iteration)
        count = 1 if self.config.same_step_across_chunks else chunks
        exit_steps = tuple(
            self.noise.sample_shared_exit(f"{purpose}.exit_step", allowed) for _ in range(count)
        )
        return exit_steps * (chunks // count)
