"""Clips that the student makes in training: one model call with gradient, at a sampler's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from distill_protocols import Batch, Condition, Latents, main_part, map_latents
from torch import Tensor

from distill_methods.context import MethodContext
from distill_methods.contracts import chunks_of
from distill_methods.exits import ExitSteps, weight_within
from distill_methods.latent_config import LatentMethodConfig, RolloutSource
from distill_methods.maths import repeat_per_frame
from distill_methods.parts import measure_parts, name_parts
from distill_methods.time_sampling import TimeRange, fraction_within


class Rollout(NamedTuple):
    """Clips of the student.

    Attributes:
        x0: clean latents [B, C, T, H, W].
        exit_steps: the (mean) sampler step of the call that made each clip, [B].
        exits: the sampler step of the call that made each latent frame, [1 or B, 1 or T]; on the
            CPU, so that nobody waits for a device to know it.
        loss_mask: 0 on frames that stay out of the student's loss, [1, 1, T, 1, 1]; None: those
            that the condition gives, if any.
        same_on_all_ranks: whether all ranks have the same ``exits``, in their only row.
        x_end: the clips at ``t_end``, without gradient, where the student's part ends above 0: what
            another expert goes on from (Phased DMD); None: it ends at ``x0``.
        t_end: t of ``x_end``.
        cond: what the clips were made under; None: the batch's condition.
    """

    x0: Latents
    exit_steps: Tensor
    exits: Tensor
    loss_mask: Tensor | None = None
    same_on_all_ranks: bool = False
    x_end: Latents | None = None
    t_end: float = 0.0
    cond: Condition | None = None

    def outputs(self) -> dict[str, Tensor]:
        """Return the clips and their statistics, detached, for logs.

        ``student_std`` is over all exit steps, which hides that early ones are too soft and late
        ones too sharp; ``student_std/exit_<step>`` is of the frames that left at one. Both are
        means over clips of one clip's deviation: the deviation of a batch would depend on how many
        processes and micro steps divide it.
        """
        clips = map_latents(Tensor.detach, self.x0)
        return {
            **name_parts("student_x0", clips),
            **measure_parts("student_mean", Tensor.mean, clips),
            **measure_parts("student_std", lambda x: x.flatten(1).std(dim=1).mean(), clips),
            "exit_step": self.exit_steps.float().mean(),
            **self._std_by_exit(main_part(clips)),
        }

    def _std_by_exit(self, x0: Tensor) -> dict[str, Tensor]:
        frames = x0.transpose(1, 2)  # [B, T, C, H, W]
        exits = self.exits.expand(frames.shape[:2])
        numbers: dict[str, Tensor] = {}
        for step in exits.unique().tolist():
            # Places and not a mask: their number is known without asking the device.
            places = [(row == step).nonzero()[:, 0].to(x0.device) for row in exits]
            of_clips = [clip[i].std() for clip, i in zip(frames, places, strict=True) if len(i)]
            numbers[f"student_std/exit_{step}"] = torch.stack(of_clips).mean()
        return numbers


class RolloutFunction(Protocol):
    """Makes the student's clips: what the methods of distribution matching differ in."""

    def __call__(self, batch: Batch, turn: str, iteration: int) -> Rollout:
        """Make a clip for each sample, with gradient where the caller's mode allows it.

        Args:
            turn: the role whose turn it is ("student", "critic" ...); each turn draws numbers of
                its own.
        """
        ...


class StudentRollouts:
    """One call with gradient: ``x = G(x_in, t_k)`` at a step k of the student's sampler.

    x_in is either the student's own sampling from noise up to step k (DMD2, Yin et al. 2024,
    section 4.5, backward simulation), or noised data. Every sample draws from rows of its own, so
    that micro batches and ranks see the numbers that one large batch would.

    Args:
        source: where x_in comes from. "simulate": k is one for the micro batch and all ranks.
            "data": k is drawn per sample.
        per_chunk: with ``source="data"``, k is drawn for each chunk of a causal student (CausVid,
            Yin et al. 2025, section 4.2), and not one a clip.
        with_clean: t = 0 is one more level that may be drawn: x_in is then the data itself.
    """

    def __init__(
        self,
        context: MethodContext,
        config: LatentMethodConfig,
        source: RolloutSource,
        *,
        per_chunk: bool = False,
        with_clean: bool = False,
    ) -> None:
        self._context = context
        self._config = config
        self._source = source
        self._per_chunk = per_chunk
        self._with_clean = with_clean
        # On the device once: copying them in each step would make the host wait for it.
        self._levels = torch.tensor((*config.student_levels, 0.0)).to(context.device)

    def __call__(self, batch: Batch, turn: str, iteration: int) -> Rollout:
        """See ``RolloutFunction``."""
        purpose = f"{self._context.name}.{turn}"
        exit_steps = allowed_exit_steps(
            self._context, self._config, purpose, iteration, with_clean=self._with_clean
        )
        if self._source == "data":
            return self._denoise_data(batch, purpose, exit_steps)
        return simulate(self._context, self._config, batch, purpose, exit_steps)

    def _denoise_data(self, batch: Batch, purpose: str, exit_steps: ExitSteps) -> Rollout:
        context, frames = self._context, ()
        if self._per_chunk:
            chunks = chunks_of(context.adapter, "student", batch.latent_shape[1])
            frames = tuple(chunk.frames for chunk in chunks)
        exits = context.noise.sample_exits(
            f"{purpose}.data_step", len(batch), exit_steps, (len(frames),) if frames else ()
        )
        steps = exits.to(batch.device)
        t = self._levels[steps]
        if frames:
            t = repeat_per_frame(t, frames)
        noise = context.noise.clip_noise(batch, f"{purpose}.data_noise")
        x0_data = context.adapter.normalize_latents(batch.clean_latents)
        x_t = context.adapter.add_noise(x0_data, noise, t)
        x0 = context.adapter.forward("student", x_t, t, batch.cond, fwd_pred_type="x0")
        exits = (repeat_per_frame(exits, frames) if frames else exits[:, None]).cpu()
        mean_steps = steps.float().mean(dim=1) if frames else steps
        return Rollout(x0, mean_steps, exits, same_on_all_ranks=False)


def shared_exit(rollout: Rollout) -> int:
    """Return the sampler step that all clips of ``rollout`` left at."""
    assert rollout.exits.numel() == 1
    return int(rollout.exits)


def simulate(
    context: MethodContext,
    config: LatentMethodConfig,
    batch: Batch,
    purpose: str,
    exit_steps: ExitSteps,
    *,
    on_step: Callable[[int, Latents], None] | None = None,
) -> Rollout:
    """Sample the student from noise up to a step k of ``exit_steps``: k calls without gradient,
    then one at level k, with gradient where the caller's mode allows it.

    Args:
        on_step: see ``Sampler.rollout``; of students that are not causal.
    """
    size = len(batch)
    # Shared, as k decides how many calls there are: the ranks of a sharded student would
    # otherwise wait for each other for ever.
    k = context.noise.sample_shared_exit(f"{purpose}.exit_step", exit_steps)
    x0 = context.adapter.rollout(
        "student",
        config.student_sampler,
        context.noise.clip_noise(batch, f"{purpose}.rollout"),
        batch.cond,
        exit_steps=(k,) * len(chunks_of(context.adapter, "student", batch.latent_shape[1])),
        generators=context.noise.streams.rows(f"{purpose}.rollout.fresh", size),
        poll=context.poll,
        on_step=on_step,
    )
    steps = torch.full((size,), k, device=x0.device)
    return Rollout(x0, steps, torch.tensor([[k]]), same_on_all_ranks=True)


def allowed_exit_steps(
    context: MethodContext,
    config: LatentMethodConfig,
    purpose: str,
    iteration: int,
    *,
    with_clean: bool = False,
) -> ExitSteps:
    """Return the sampler steps that ``iteration`` may take the student at: all of them, or, of a
    student of two experts, those of one expert (``NoiseSampler.sample_range``).

    Args:
        with_clean: t = 0 is one more level, numbered after the last step, with the mean of their
            weights.
    """
    levels, weights = config.student_levels, config.exit_weights

    def fraction(time_range: TimeRange) -> float:
        return weight_within(levels, weights, *time_range)

    time_range = context.noise.sample_range(f"{purpose}.step", iteration, fraction, "student")
    if with_clean:
        levels, weights = (*levels, 0.0), (*weights, sum(weights) / len(weights))
    steps = tuple(
        step
        for step, t in enumerate(levels)
        if time_range is None or fraction_within([t], *time_range)
    )
    return ExitSteps(steps, tuple(weights[step] for step in steps))
