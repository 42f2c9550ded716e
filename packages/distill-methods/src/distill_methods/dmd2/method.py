"""DMD2 as a training method. The maths is in ``distill_methods.maths``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from distill_protocols import (
    Batch,
    ConditioningProvider,
    ModelBundle,
    RandomStreams,
    StepResult,
)
from torch import Tensor

from distill_methods.contracts import LatentDiffusion
from distill_methods.dmd2.config import DMD2Config
from distill_methods.dmd2.rollout import from_data, simulate
from distill_methods.latent_method import LatentMethod
from distill_methods.maths import (
    dmd_gradient,
    dmd_loss,
    dmd_normaliser,
    noise_like,
    velocity_loss,
)
from distill_methods.time_ranges import share_of_levels
from distill_methods.time_sampling import TimeSampling


class _Rollout(NamedTuple):
    """The student's clean latents [B, C, T, H, W] and the step at which each was taken, [B]."""

    x0: Tensor
    exit_steps: Tensor


class DMD2Method(LatentMethod[DMD2Config]):
    """DMD2 without its optional GAN (Yin et al. 2024, arXiv:2405.14867).

    With a frozen teacher and a critic that follows the student::

        x   = G(x_in, t_k)                                  student, by rollout
        x_t = (1 - s) x + s eps,  t = clamp(1000 S_k(u), t_min, t_max), per sample
        f   = critic(x_t, c);  r = u + w (c - u) of the teacher, both as x0, without gradient
        g   = nan_to_num((f - r) / mean |x - r|)            per sample
        L_G = 0.5 mean((x - stop(x - g))^2)                 so that dL_G/dx = g / numel
        L_C = mean |critic_v(x'_t) - (eps' - x')|^2         x' detached, t' and eps' its own

    Who learns when is ``DMD2Config.turns``. In an iteration in which both learn, the two losses
    are added and differentiated at once; they share no graph, as every call that must not learn
    runs without gradient and with its weights frozen.

    Where the public codes disagree, and what is done here:

    - The critic's clips come from a rollout of their own, with fresh noise (Self-Forcing,
      CausVid, FastVideo). tianweiy/DMD2 gives the critic the very clips of the student's turn.
    - The normaliser is per sample (all but FastVideo, which averages over the batch).
    - t is per sample (Self-Forcing and FastVideo draw one for the batch).
    - With ``rollout: simulate`` the exit step k is one for the batch and all ranks, drawn for
      each micro batch; with ``rollout: data`` it is per sample.
    - Of a model of two experts, an iteration takes the student at the steps of one of them, and
      judges at the t of one: which, is drawn for the iteration with their shares as chances.
    - The critic is conditional only; it is never guided.
    - The critic's loss is on v (Self-Forcing and FastVideo; tianweiy/DMD2 on eps).

    ``outputs``: ``student_x0`` of the turn; in the student's turn ``teacher_x0`` and
    ``critic_x0``, the mean normaliser, the gradient's rms, the mean |f - r|; always the mean and
    std of ``student_x0`` and the (mean) exit step. A nan normaliser means that a prediction was
    not finite and that its samples were left out by nan_to_num.

    Args:
        bundle: student and critic, both trainable, and a frozen teacher.
        conditioning: gives the negative condition, unless the teacher's guidance is 1.

    Raises:
        RoleError: a role is missing, the teacher is trainable, or student or critic is not.
        CapabilityError: the adapter lacks something in ``config.capabilities``.
        ConditioningError: the teacher is guided and there is no negative condition.
    """

    required_roles = ("student", "teacher", "critic")
    trained_roles = ("student", "critic")
    frozen_roles = ("teacher",)

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
        # Here once, as copying them in each step would make the host wait for the device.
        levels = torch.tensor([1000 * sigma for sigma in config.student_sampler.sigmas()])
        self._times_of_steps = levels.tolist()
        self._levels = levels.to(self._device())

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """``dmd_loss`` in the student's turn, ``critic_loss`` in the critic's, and their sum."""
        turns = self.config.turns(iteration)
        losses: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        # The critic first: where both learn, the outputs shown are those of the student's turn.
        if "critic" in turns:
            with self.bundle["student"].frozen():
                losses["critic_loss"], found = self._critic_turn(batch, iteration)
            outputs.update(found)
        if "student" in turns:
            with self.bundle["critic"].frozen():
                losses["dmd_loss"], found = self._student_turn(batch, iteration)
            outputs.update(found)
        return StepResult(
            {"total_loss": torch.stack(list(losses.values())).sum(), **losses}, outputs
        )

    # -- turns --------------------------------------------------------------------------------

    def _student_turn(self, batch: Batch, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        rollout = self._rollout(batch, "student", iteration)
        x, trained = rollout.x0, self.trained_frames(batch.cond)
        with torch.no_grad():
            time, judges = self.config.score_time, ("teacher", "critic")
            x_t, _, t = self._noised(x, "student", iteration, time, *judges)
            fake = self.adapter.forward("critic", x_t, t, batch.cond, fwd_pred_type="x0")
            real = self.adapter.forward(
                "teacher",
                x_t,
                t,
                batch.cond,
                fwd_pred_type="x0",
                neg_cond=self._negative,
                cfg=self.config.real_score_guidance_scale,
            )
            gradient = dmd_gradient(x, fake, real, trained)
            outputs = _facts(rollout) | {
                "teacher_x0": real,
                "critic_x0": fake,
                "dmd_normaliser": dmd_normaliser(x, real, trained).mean(),
                "dmd_gradient_rms": gradient.square().mean().sqrt(),
                "score_distance": (fake - real).abs().mean(),
            }
        return dmd_loss(x, gradient, trained), outputs

    def _critic_turn(self, batch: Batch, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            rollout = self._rollout(batch, "critic", iteration)
            time = self.config.critic_time or self.config.score_time
            x_t, noise, t = self._noised(rollout.x0, "critic", iteration, time, "critic")
            target = self.adapter.target(rollout.x0, noise, t, "v")
        velocity = self.adapter.forward("critic", x_t, t, batch.cond, fwd_pred_type="v")
        loss = velocity_loss(velocity, target, trained=self.trained_frames(batch.cond))
        return loss, _facts(rollout)

    # -- parts --------------------------------------------------------------------------------

    def _rollout(self, batch: Batch, turn: str, iteration: int) -> _Rollout:
        """The student's clean latents, with gradient where the caller allows it.

        Every draw of a sample has rows of its own, so that micro batches and ranks see the
        numbers that one large batch would.
        """
        spec, size = self.config.student_sampler, len(batch)
        among = self._steps(turn, iteration)
        if self.config.rollout == "simulate":
            # Shared, or the ranks of a sharded student would wait for each other for ever.
            generator = self.streams.get(f"dmd2.{turn}.exit_step", shared=True)
            k = among[int(torch.randint(len(among), (), generator=generator))]
            x0 = simulate(
                self.adapter,
                spec,
                batch.cond,
                exit_step=k,
                draw_noise=lambda step: noise_like(
                    batch.latents, self.streams.rows(f"dmd2.{turn}.rollout.{step}", size)
                ),
                poll=self.stop.poll,
            )
            return _Rollout(x0, torch.full((size,), k, device=x0.device))
        drawn = self.streams.rows(f"dmd2.{turn}.data_step", size).integers(len(among))
        steps = torch.tensor(among, device=drawn.device)[drawn].to(batch.latents.device)
        noise = noise_like(batch.latents, self.streams.rows(f"dmd2.{turn}.data_noise", size))
        latents = self.adapter.normalize_latents(batch.latents)
        x0 = from_data(
            self.adapter, batch.cond, latents=latents, noise=noise, t=self._levels[steps]
        )
        return _Rollout(x0, steps)

    def _steps(self, turn: str, iteration: int) -> list[int]:
        """The steps that the student may be taken at: those of one expert in an iteration."""
        levels = self._times_of_steps
        within = self.range_of(
            f"dmd2.{turn}.step", iteration, lambda r: share_of_levels(levels, *r), "student"
        )
        steps = range(len(levels))
        return [i for i in steps if within is None or share_of_levels([levels[i]], *within)]

    def _noised(
        self, x0: Tensor, turn: str, iteration: int, time: TimeSampling, *roles: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, noise, t) at a fresh t per sample, at which ``roles`` can be called."""
        t = self.times(f"dmd2.{turn}.t", len(x0), iteration, time, *roles).to(x0.device)
        noise = noise_like(x0, self.streams.rows(f"dmd2.{turn}.noise", len(x0)))
        return self.adapter.add_noise(x0, noise, t), noise, t

    # -- for the run --------------------------------------------------------------------------


def _facts(rollout: _Rollout) -> dict[str, Tensor]:
    x0 = rollout.x0.detach()
    return {
        "student_x0": x0,
        "student_mean": x0.mean(),
        "student_std": x0.std(),
        "exit_step": rollout.exit_steps.float().mean(),
    }
