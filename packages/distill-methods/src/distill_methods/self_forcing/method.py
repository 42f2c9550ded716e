"""Self-Forcing as a training method: its rollout. The rest is ``distribution_matching``."""

from __future__ import annotations

import torch
from distill_protocols import (
    Batch,
    CausalRollout,
    ConditioningProvider,
    ContractError,
    ModelBundle,
    RandomStreams,
    StepResult,
)
from torch import Tensor

from distill_methods.contracts import LatentDiffusion, causal_of
from distill_methods.distribution_matching.matching import (
    DistributionMatching,
    Rollout,
    exit_levels,
)
from distill_methods.latent_method import LatentMethod
from distill_methods.maths import noise_of
from distill_methods.self_forcing.config import SelfForcingConfig


class SelfForcingMethod(LatentMethod[SelfForcingConfig]):
    """A causal student learns on videos that it made chunk by chunk, from its own past (Huang et
    al. 2025, arXiv:2506.08009, algorithm 1)::

        for chunk i:
            z = eps_i
            for j < k: x = G(z, t_j, past); z = noise(x, t_j+1)     no gradient
            x_i = G(z, t_k, past)                                   with gradient
            past += G(noise(stop(x_i), t_context), t_context)       no gradient, not after the last
        loss: distribution matching of [x_0 x_1 ...], judged by models that see whole clips

    ``DistributionMatching`` has the losses and the outputs. The past is detached, so a chunk's
    loss reaches the call that made it and nothing else, and a step keeps the graph of one call a
    chunk, however many steps the sampler has.

    Deviations from guandeh17/Self-Forcing:

    - Keys and values of the past never change: there they are overwritten in place, and with
      activation checkpointing a chunk's gradient leaks into others.
    - Context noise 0 is no noise at all (there a look-up adds sigma 0.005 and says t = 0).
    - Nothing is stored after the last chunk, as nobody would read it.
    - Of a rollout longer than a clip, the first frame that the scores see is left as it is and
      kept out of the student's loss. There it is decoded and encoded again as a picture, and its
      chunk is kept out.
    - t of the scores is per sample, and clips are noised with exactly that t. Its ``ts_schedule``,
      which bounds t by the exit step, is not built.
    - Of a student of two experts, an iteration takes chunks at the steps of one of them, drawn
      with their shares as chances; steps before go to whichever expert has their t.

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
        self._matching = DistributionMatching(
            "self_forcing", bundle, adapter, config, draws=self.draws, negative=self.negative
        )
        self._causal = causal_of(adapter, "self_forcing")
        self._lengths = _lengths(config, self._causal, adapter.latent_shape[1])

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """``dmd_loss`` in the student's turn, ``critic_loss`` in the critic's, and their sum."""
        return self._matching.step(batch, iteration, self._rollout)

    def _rollout(self, batch: Batch, turn: str, iteration: int) -> Rollout:
        """Length and exit steps are shared, or ranks of a sharded student would wait for each
        other for ever; noise is a sample's own."""
        purpose, size = f"self_forcing.{turn}", len(batch)
        channels, clip, height, width = self.adapter.latent_shape
        frames = self._lengths[self.draws.shared_integer(f"{purpose}.length", len(self._lengths))]
        chunks = self._causal.chunks("student", frames)
        exits = self._exits(purpose, iteration, len(chunks))
        learned = _learned_frames(self.config, clip)
        device = batch.latents.device
        noise = noise_of(
            (channels, frames, height, width), self.streams.rows(f"{purpose}.rollout", size), device
        )
        x0 = self.adapter.rollout(
            "student",
            self.config.student_sampler,
            noise,
            batch.cond,
            exit_steps=exits,
            requires_grad=[chunk.first >= frames - learned for chunk in chunks],
            generators=self.streams.rows(f"{purpose}.rollout.fresh", size),
            poll=self.stop.poll,
        )
        steps = torch.full((size,), sum(exits) / len(exits), device=device)
        if frames == clip:
            return Rollout(x0, steps)
        return Rollout(x0[:, :, -clip:], steps, _all_but_the_first(clip, device))

    def _exits(self, purpose: str, iteration: int, chunks: int) -> tuple[int, ...]:
        if self.config.last_step_only:
            return (self.config.student_sampler.steps - 1,) * chunks
        among = exit_levels(self.draws, self.config, purpose, iteration)
        drawn = 1 if self.config.same_step_across_chunks else chunks
        exits = tuple(
            among[self.draws.shared_integer(f"{purpose}.exit_step", len(among))]
            for _ in range(drawn)
        )
        return exits * (chunks // drawn)


def _learned_frames(config: SelfForcingConfig, clip: int) -> int:
    """Those at the end whose chunks learn: never more than the scores see."""
    return clip if config.gradient_frames is None else min(config.gradient_frames, clip)


def _lengths(config: SelfForcingConfig, causal: CausalRollout, clip: int) -> tuple[int, ...]:
    """Latent frames that a rollout may have."""
    lengths: tuple[int, ...] = (clip,)
    if config.rollout_frames is not None:
        low, high = config.rollout_frames
        whole = [chunk.stop for chunk in causal.chunks("student", high)]
        # The last may be shorter than a chunk, and then no video ends there.
        if causal.chunks("student", high + 1)[len(whole) - 1].stop > high:
            whole.pop()
        lengths = tuple(frames for frames in whole if max(low, clip) <= frames)
        if low < clip or not lengths:
            raise ContractError(
                f"rollout_frames {[low, high]}: a rollout is made of whole chunks, which end at "
                f"frames {whole or 'beyond that'}, and is at least as long as the run's clips of "
                f"{clip} latent frames, because the scores judge a whole clip. Give numbers that "
                "hold one, or leave it out"
            )
    last = max(causal.chunks("student", frames)[-1].frames for frames in lengths)
    if last > _learned_frames(config, clip):
        raise ContractError(
            f"gradient_frames {config.gradient_frames} is less than the {last} latent frames of "
            "the last chunk, so no chunk would be called with gradient and the student would "
            "never learn. Give at least that, or null"
        )
    return lengths


def _all_but_the_first(frames: int, device: torch.device) -> Tensor:
    trained = torch.ones(1, 1, frames, 1, 1, device=device)
    trained[:, :, 0] = 0
    return trained
