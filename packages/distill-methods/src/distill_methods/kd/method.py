"""KD as a training method. The trajectories come from ``apps/trajectories``.

Letters: B batch, K levels of the student, C T H W as everywhere.
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
)
from torch import Tensor

from distill_methods.contracts import LatentDiffusion, chunks_of
from distill_methods.kd.config import KDConfig
from distill_methods.latent_method import LatentMethod
from distill_methods.maths import regression_loss
from distill_methods.time_ranges import Range, share_of_levels


class Picked(NamedTuple):
    """What the student is called with: x_t [B, C, T, H, W], t [B] or [B, T], and what each element
    counts in the loss, [B, 1, T, 1, 1]."""

    x_t: Tensor
    t: Tensor
    weight: Tensor


class Choice(NamedTuple):
    """Levels that may be drawn (K: t = 0), int64, and what makes up for the one among them that
    has no loss."""

    levels: Tensor
    scale: float


class KDMethod(LatentMethod[KDConfig]):
    """ODE regression: the student predicts, from a state of the teacher's way, where it ended.

    Of a stored trajectory x_{t_1} ... x_{t_K} that ends in x0 (CausVid, Yin et al. 2025,
    arXiv:2412.07772, section 4.3; Luhman & Luhman 2021)::

        L = mean |x0_student(x_{t_k}, t_k, c) - x0|^2

    k is uniform: one a sample, or of a causal student one a chunk. Then each chunk sees the chunks
    before it as ``config.past`` says. Of a model of two experts an iteration takes the levels of
    one of them.

    Where the public codes disagree, and what is done here:

    - The loss is on x0 with every level counting alike (CausVid, FastGen), which in v is a weight
      of s^2.
    - FastGen takes half of it. Here, as in CausVid, it is the mean square itself.
    - Chunks at t = 0 have no loss. CausVid takes the mean over the others of the batch, so what one
      sample counts depends on its neighbours; here each element counts (K + 1) / K, which is the
      same on average, and a batch is the sum of its parts.
    - The student is called at its sampler's own t. CausVid tells it 757 of x at 756.76.

    ``outputs``: ``student_x0``, ``teacher_x0`` (the trajectory's end), and the mean t.

    Args:
        bundle: a trainable student; other roles are not called.

    Raises:
        RoleError: there is no student, or it is frozen.
        CapabilityError: the adapter lacks something in ``config.capabilities``.
    """

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
        self._chunks = chunks_of(adapter, "student")
        # Here once, as copying them in each step would make the host wait for the device.
        lengths = torch.tensor([chunk.frames for chunk in self._chunks])
        chunk_of_frame = torch.arange(len(lengths)).repeat_interleave(lengths)
        self._chunk_of_frame = chunk_of_frame.to(self._device())
        self._levels = torch.tensor((*config.trajectory_times, 0.0)).to(self._device())
        self._choices: dict[Range | None, Choice] = {}

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """The regression loss of one micro batch.

        Raises:
            ContractError: the batch holds no trajectory of the student's levels.
        """
        x0 = self.adapter.normalize_latents(batch.latents)
        x_t, t, weight = self._picked(x0, batch, iteration)
        past = CleanPast(latents=x0) if self.config.past == "clean" else None
        predicted = self.adapter.forward(
            "student", x_t, t, batch.cond, fwd_pred_type="x0", caches=past
        )
        loss = regression_loss(predicted, x0, weight, self.draws.trained_frames(batch.cond))
        outputs = {"student_x0": predicted.detach(), "teacher_x0": x0, "mean_t": t.mean()}
        return StepResult({"total_loss": loss}, outputs)

    def _picked(self, x0: Tensor, batch: Batch, iteration: int) -> Picked:
        """A level for each chunk of each sample: K stands for t = 0."""
        states = self._states(batch)
        choice = self._choice(iteration)
        drawn = self.streams.rows("kd.level", len(x0)).integers(
            len(choice.levels), (len(self._chunks),)
        )
        k = choice.levels[drawn.to(x0.device)][:, self._chunk_of_frame]
        t = self._levels[k]
        among = torch.cat([states, x0[:, None]], dim=1)
        places = k[:, None, None, :, None, None].expand(-1, 1, *x0.shape[1:3], *x0.shape[3:])
        x_t = among.gather(1, places).squeeze(1)
        weight = choice.scale * (t > 0).float().view(len(x0), 1, -1, 1, 1)
        return Picked(x_t, t if len(self._chunks) > 1 else t[:, 0], weight)

    def _choice(self, iteration: int) -> Choice:
        """Levels of one expert, where there are two; t = 0 among them where a past may be clean."""
        within = self.draws.range_of(
            "kd.level",
            iteration,
            lambda r: share_of_levels(self.config.trajectory_times, *r),
            "student",
        )
        if within not in self._choices:
            mixed = self.config.past == "mixed" and len(self._chunks) > 1
            candidates = [
                (k, t)
                for k, t in enumerate((*self.config.trajectory_times, 0.0))
                if (within is None or share_of_levels([t], *within)) and (t > 0 or mixed)
            ]
            levels = torch.tensor([k for k, _ in candidates]).to(self._device())
            scale = len(candidates) / sum(t > 0 for _, t in candidates)
            self._choices[within] = Choice(levels, scale)
        return self._choices[within]

    def _states(self, batch: Batch) -> Tensor:
        wanted = len(self.config.trajectory_times)
        found = batch.trajectory
        if found is None or found.shape[1] != wanted:
            held = "none" if found is None else str(found.shape[1])
            raise ContractError(
                f"the batch holds {held} states of a trajectory, and the student is sampled at "
                f"{wanted} levels, each of which it learns at. Open the data set with "
                "LatentDataset(times=config.trajectory_times)"
            )
        return found
