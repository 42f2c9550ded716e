"""The two turns of distribution matching: the student's, and its critic's."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from distill_protocols import Batch, Condition, ModelBundle, StepResult
from torch import Tensor

from distill_methods.contracts import LatentDiffusion
from distill_methods.distribution_matching.config import MatchingConfig
from distill_methods.draws import Draws
from distill_methods.maths import dmd_gradient, dmd_loss, dmd_normaliser, velocity_loss
from distill_methods.time_ranges import share_of_levels


class Rollout(NamedTuple):
    """The student's clean latents [B, C, T, H, W] and the (mean) step at which each was taken,
    [B]."""

    x0: Tensor
    exit_steps: Tensor


class RolloutOf(Protocol):
    """Where the student's clips come from: what the methods differ in."""

    def __call__(self, batch: Batch, turn: str, iteration: int) -> Rollout:
        """With gradient where the caller allows it.

        Args:
            turn: "student" or "critic"; each has draws of its own.
        """
        ...


class DistributionMatching:
    """Distribution matching of whatever clips a method's rollout gives (DMD2, Yin et al. 2024,
    arXiv:2405.14867, without its GAN).

    With frozen teachers and a critic that follows the student::

        x   = a clip of the student
        x_t = (1 - s) x + s eps,  t = clamp(1000 S_k(u), t_min, t_max), per sample
        f   = critic(x_t, c);  r = sum_i a_i (u + w_i (c - u)) of teacher i; as x0, no gradient
        g   = nan_to_num((f - r) / mean |x - r|)            per sample
        L_G = 0.5 mean((x - stop(x - g))^2)                 so that dL_G/dx = g / numel
        L_C = mean |critic_v(x'_t) - (eps' - x')|^2         x' detached, t' and eps' its own

    Who learns when is ``MatchingConfig.turns``. In an iteration in which both learn, the two losses
    are added and differentiated at once; they share no graph, as every call that must not learn
    runs without gradient and with its weights frozen.

    ``outputs``: ``student_x0`` of the turn; in the student's turn ``teacher_x0`` and
    ``critic_x0``, the mean normaliser, the gradient's rms, the mean |f - r|; always the mean and
    std of ``student_x0`` and the (mean) exit step. A nan normaliser means that a prediction was
    not finite and that its samples were left out by nan_to_num.

    Args:
        name: of the method; its draws are named after it.
        negative: one row, where a teacher is guided.
    """

    def __init__(
        self,
        name: str,
        bundle: ModelBundle,
        adapter: LatentDiffusion,
        config: MatchingConfig,
        *,
        draws: Draws,
        negative: Condition | None,
    ) -> None:
        self._name = name
        self._bundle = bundle
        self._adapter = adapter
        self._config = config
        self._draws = draws
        self._negative = negative

    def step(self, batch: Batch, iteration: int, rollout: RolloutOf) -> StepResult:
        """``dmd_loss`` in the student's turn, ``critic_loss`` in the critic's, and their sum."""
        turns = self._config.turns(iteration)
        losses: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        # The critic first: where both learn, the outputs shown are those of the student's turn.
        if "critic" in turns:
            with self._bundle["student"].frozen():
                losses["critic_loss"], found = self._critic_turn(batch, iteration, rollout)
            outputs.update(found)
        if "student" in turns:
            with self._bundle["critic"].frozen():
                losses["dmd_loss"], found = self._student_turn(batch, iteration, rollout)
            outputs.update(found)
        return StepResult(
            {"total_loss": torch.stack(list(losses.values())).sum(), **losses}, outputs
        )

    def _student_turn(
        self, batch: Batch, iteration: int, rollout: RolloutOf
    ) -> tuple[Tensor, dict[str, Tensor]]:
        made = rollout(batch, "student", iteration)
        x, trained = made.x0, self._draws.trained_frames(batch.cond)
        with torch.no_grad():
            judges = ("critic", *self._config.terms)
            x_t, _, t = self._draws.noised(
                x, f"{self._name}.student", iteration, self._config.score_time, *judges
            )
            fake = self._adapter.forward("critic", x_t, t, batch.cond, fwd_pred_type="x0")
            real = self._real_x0(x_t, t, batch.cond)
            gradient = dmd_gradient(x, fake, real, trained)
            outputs = _facts(made) | {
                "teacher_x0": real,
                "critic_x0": fake,
                "dmd_normaliser": dmd_normaliser(x, real, trained).mean(),
                "dmd_gradient_rms": gradient.square().mean().sqrt(),
                "score_distance": (fake - real).abs().mean(),
            }
        return dmd_loss(x, gradient, trained), outputs

    def _real_x0(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """r: what the teachers make of it, each with its own guidance."""
        real: Tensor | None = None
        for name, (weight, guidances) in self._config.terms.items():
            x0 = self._adapter.forward(
                name,
                x_t,
                t,
                cond,
                fwd_pred_type="x0",
                neg_cond=self._negative,
                cfg=self._draws.guidance(name, t, guidances),
            )
            part = x0 if weight == 1 else weight * x0
            real = part if real is None else real + part
        assert real is not None  # a config has a teacher
        return real

    def _critic_turn(
        self, batch: Batch, iteration: int, rollout: RolloutOf
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            made = rollout(batch, "critic", iteration)
            time = self._config.critic_time or self._config.score_time
            x_t, noise, t = self._draws.noised(
                made.x0, f"{self._name}.critic", iteration, time, "critic"
            )
            target = self._adapter.target(made.x0, noise, t, "v")
        velocity = self._adapter.forward("critic", x_t, t, batch.cond, fwd_pred_type="v")
        trained = self._draws.trained_frames(batch.cond)
        return velocity_loss(velocity, target, trained=trained), _facts(made)


def exit_levels(
    draws: Draws, config: MatchingConfig, purpose: str, iteration: int
) -> tuple[int, ...]:
    """Steps of the student's sampler that it may be taken at: those of one expert an iteration."""
    levels = [1000 * sigma for sigma in config.student_sampler.sigmas()]
    share_of: Callable[[tuple[float, float]], float] = lambda r: share_of_levels(levels, *r)  # noqa: E731
    within = draws.range_of(f"{purpose}.step", iteration, share_of, "student")
    return tuple(i for i, t in enumerate(levels) if within is None or share_of_levels([t], *within))


def _facts(rollout: Rollout) -> dict[str, Tensor]:
    x0 = rollout.x0.detach()
    return {
        "student_x0": x0,
        "student_mean": x0.mean(),
        "student_std": x0.std(),
        "exit_step": rollout.exit_steps.float().mean(),
    }
