"""KD as a training method: regression on stored trajectories (``apps/trajectories`` makes them).

Letters: B batch, K levels of the student, C T H W as in ``maths``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from distill_protocols import (
    Batch,
    CleanPast,
    ConditioningProvider,
    ContractError,
    ModelBundle,
    RandomStreams,
    StepResult,
    one_tensor,
)
from torch import Tensor

from distill_methods.contracts import LatentDiffusion, chunks_of, loss_mask_of
from distill_methods.kd.config import KDConfig
from distill_methods.latent_method import LatentMethod
from distill_methods.maths import x0_regression_loss
from distill_methods.time_sampling import TimeRange, fraction_within


class StudentInput(NamedTuple):
    """The arguments of the student's call, and its weight in the loss.

    Attributes:
        x_t: [B, C, T, H, W].
        t: [B], or [B, T] of a student of several chunks.
        weight: what each frame counts in the loss, [B, 1, T, 1, 1].
    """

    x_t: Tensor
    t: Tensor
    weight: Tensor


class LevelChoice(NamedTuple):
    """Levels that may be drawn in an iteration.

    Attributes:
        levels: their indices, int64; K stands for t = 0.
        loss_scale: makes up for t = 0, which may be drawn and has no loss.
    """

    levels: Tensor
    loss_scale: float


class KDMethod(LatentMethod[KDConfig]):
    """ODE regression: from a state on the teacher's trajectory, the student predicts its end.

    With a stored trajectory x_{t_1} ... x_{t_K} that ends in x0 (CausVid, Yin et al. 2025,
    arXiv:2412.07772, section 4.3; Luhman & Luhman 2021)::

        L = mean |x0_student(x_{t_k}, t_k, c) - x0|^2

    k is uniform, drawn for each sample, or for each chunk of a causal student. Each chunk then sees
    the chunks before it as ``config.past`` states. If the student has two experts, an iteration
    takes the levels of one of them.

    Where the public codes disagree, and what is done here:

    - The loss is on x0 with every level counting alike (CausVid, FastGen), which in v is a weight
      of s^2.
    - FastGen halves it. Here, as in CausVid, it is the mean square itself.
    - Chunks at t = 0 have no loss. CausVid takes the mean over the others of the batch, so how much
      one sample counts depends on its neighbours; here each element counts (K + 1) / K, which is
      the same on average, and a batch is the sum of its parts.
    - The student is called at its sampler's own t. CausVid calls it at 757 where x is at 756.76.

    ``outputs``: ``student_x0``, ``teacher_x0`` (the trajectory's end), and the mean t.

    Args:
        bundle: a trainable student; other roles are not called.

    Raises:
        RoleError: there is no student, or it is frozen.
        CapabilityError: the adapter lacks something in ``config.capabilities``.
    """

    name = "kd"

    def __init__(
        self,
        bundle: ModelBundle,
        adapter: LatentDiffusion,
        config: KDConfig,
        *,
        conditioning: ConditioningProvider,
        streams: RandomStreams | None = None,
    ) -> None:
        super().__init__(bundle, adapter, config, conditioning=conditioning, streams=streams)
        # On the device once: copying them in each step would make the host wait for it.
        self._levels = torch.tensor((*config.trajectory_times, 0.0)).to(self.context.device)
        self._choices: dict[tuple[TimeRange | None, bool], LevelChoice] = {}
        self._chunks: dict[int, Tensor] = {}

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """Compute the regression loss of one micro batch.

        Raises:
            ContractError: the batch holds no trajectory of the student's levels.
        """
        x0 = self.adapter.normalize_latents(one_tensor(batch.clean_latents))
        x_t, t, weight = self._sample_student_input(x0, batch, iteration)
        past = CleanPast(latents=x0) if self.config.past == "clean" else None
        student_x0 = self.adapter.forward(
            "student", x_t, t, batch.cond, fwd_pred_type="x0", caches=past
        )
        loss = x0_regression_loss(student_x0, x0, weight, loss_mask_of(self.adapter, batch))
        outputs = {"student_x0": student_x0.detach(), "teacher_x0": x0, "mean_t": t.mean()}
        return StepResult({"total_loss": loss}, outputs)

    def _sample_student_input(self, x0: Tensor, batch: Batch, iteration: int) -> StudentInput:
        """Draw a level for each chunk of each sample, and take the frames of its state."""
        trajectory = self._trajectory_of(batch)
        chunk_of_frame, chunks = self._divide(x0.shape[2])
        choice = self._level_choice(iteration, in_chunks=chunks > 1)
        indices = self.streams.rows("kd.level", len(x0)).integers(len(choice.levels), (chunks,))
        k = choice.levels[indices.to(x0.device)][:, chunk_of_frame]  # [B, T]
        t = self._levels[k]
        # One more state at index K, x0 itself, for t = 0: each frame is then gathered from the
        # state of its own level.
        states = torch.cat([trajectory, x0[:, None]], dim=1)  # [B, K + 1, C, T, H, W]
        state_index = k[:, None, None, :, None, None].expand(-1, 1, *x0.shape[1:3], *x0.shape[3:])
        x_t = states.gather(1, state_index).squeeze(1)
        # At t = 0 the prediction is the input, so there is nothing to learn. The scale keeps the
        # expected loss that of the levels above 0, without reference to the rest of the batch.
        weight = choice.loss_scale * (t > 0).float().view(len(x0), 1, -1, 1, 1)
        return StudentInput(x_t, t if chunks > 1 else t[:, 0], weight)

    def _divide(self, frames: int) -> tuple[Tensor, int]:
        """Return the number of each frame's chunk [T], and how many chunks there are."""
        chunks = chunks_of(self.adapter, "student", frames)
        if frames not in self._chunks:
            # Kept: copying it in each step would make the host wait for the device.
            lengths = torch.tensor([chunk.frames for chunk in chunks])
            chunk_of_frame = torch.arange(len(lengths)).repeat_interleave(lengths)
            self._chunks[frames] = chunk_of_frame.to(self.context.device)
        return self._chunks[frames], len(chunks)

    def _level_choice(self, iteration: int, *, in_chunks: bool) -> LevelChoice:
        """Return the levels that ``iteration`` draws from: all, or those of one of two experts;
        t = 0 is among them where a chunk's past may be clean."""
        time_range = self.noise.sample_range(
            "kd.level",
            iteration,
            lambda r: fraction_within(self.config.trajectory_times, *r),
            "student",
        )
        with_clean = self.config.past == "mixed" and in_chunks
        if (time_range, with_clean) not in self._choices:
            candidates = [
                (k, t)
                for k, t in enumerate((*self.config.trajectory_times, 0.0))
                if (time_range is None or fraction_within([t], *time_range))
                and (t > 0 or with_clean)
            ]
            levels = torch.tensor([k for k, _ in candidates]).to(self.context.device)
            loss_scale = len(candidates) / sum(t > 0 for _, t in candidates)
            self._choices[time_range, with_clean] = LevelChoice(levels, loss_scale)
        return self._choices[time_range, with_clean]

    def _trajectory_of(self, batch: Batch) -> Tensor:
        """Return the stored states [B, K, C, T, H, W], one for each level."""
        wanted, trajectory = len(self.config.trajectory_times), batch.trajectory
        if trajectory is None or trajectory.shape[1] != wanted:
            count = "none" if trajectory is None else str(trajectory.shape[1])
            raise ContractError(
                f"the batch holds {count} states of a trajectory, and the student is sampled at "
                f"{wanted} levels, at each of which it is trained. Open the data set with "
                "LatentDataset(times=config.trajectory_times)"
            )
        return trajectory
