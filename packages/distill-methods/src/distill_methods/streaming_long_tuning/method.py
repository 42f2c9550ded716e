"""Streaming long tuning as a training method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict, cast

import torch
from attrs import evolve, frozen
from distill_protocols import (
    Batch,
    Chunk,
    Condition,
    ConditioningProvider,
    ContractError,
    ModelBundle,
    RandomStreams,
    StepResult,
)
from torch import Tensor

from distill_methods.contracts import LatentDiffusion, require_contract
from distill_methods.distribution_matching.matching import DistributionMatching
from distill_methods.latent_method import LatentMethod
from distill_methods.maths import standard_noise
from distill_methods.rollouts import Rollout, allowed_exit_steps
from distill_methods.streaming_long_tuning.config import (
    StreamingConfig,
    window_ends,
    window_problems,
)


@frozen(eq=False, kw_only=True)
class Video:
    """A video in the making, of each sample of a micro batch; its past is the adapter's.

    Attributes:
        cond: what it is made under now.
        shape: (C, T, H, W) of a window.
        next_frame: how many frames it has.
        tail: the frames with which the next window begins, [B, C, overlap, H, W], detached; None:
            it begins with new ones.
    """

    cond: Condition
    shape: tuple[int, ...]
    next_frame: int = 0
    tail: Tensor | None = None


class _VideoState(TypedDict):
    cond: Mapping[str, Tensor]
    shape: list[int]
    next_frame: int
    tail: Tensor | None
    past: Mapping[str, object]


class StreamingMethod(LatentMethod[StreamingConfig]):
    """A causal student is trained on the newest window of a video that goes on from iteration to
    iteration (Yang et al. 2025, LongLive, arXiv:2509.22622, section 3.2)::

        in each turn:
          if the video is as long as it may be: forget it; begin one under the batch's prompts
          else, with probability p: go on under the batch's prompts, the past made anew
          for each chunk of the window's new frames: as in Self-Forcing, after the video's past
          loss: distribution matching of [overlap, new frames], the overlap without the student's

    The past is detached and goes on with the video: what a window's loss reaches are the calls that
    made its new chunks. So a step costs what one of Self-Forcing costs, however long the video is,
    and the student is trained on pasts that it made over hundreds of frames.

    Each micro step of an iteration has a video of its own, and each process those of its samples.
    They are part of a checkpoint (``rank_state``): keys and values, frames, prompts and position.
    All processes are at the same place of their videos, as places decide which calls are made.

    Deviations from LongLive and FastVideo's ``streaming_long_tuning.py``:

    - The overlap stays as it is. There its first frame is decoded and encoded again as a picture.
    - Keys that are cached are never overwritten, as in ``SelfForcingMethod``.
    - The student's and the critic's turn each take a window (as LongLive does); FastVideo trains
      both on one.

    Args:
        bundle: causal student and critic, both trainable, and the frozen teachers.
        conditioning: gives the negative condition, unless no teacher is guided.

    Raises:
        RoleError: a role is missing, a teacher is trainable, or student or critic is not.
        CapabilityError: the adapter lacks something in ``config.capabilities``.
        ConditioningError: a teacher is guided and there is no negative condition.
        ContractError: windows are not of whole chunks, or no video has two of them.
    """

    name = "streaming_long_tuning"

    def __init__(
        self,
        bundle: ModelBundle,
        adapter: LatentDiffusion,
        config: StreamingConfig,
        *,
        conditioning: ConditioningProvider,
        streams: RandomStreams | None = None,
    ) -> None:
        super().__init__(bundle, adapter, config, conditioning=conditioning, streams=streams)
        self._causal = require_contract(adapter.causal, "supports_kv_cache", by=self.name)
        for problem in window_problems(config, self._divide, adapter.latent_shape[1]):
            raise ContractError(f"{'.'.join(problem.path)} {problem.message}")
        self._matching = DistributionMatching(self.context, config, self._rollout)
        self._videos: dict[int, Video] = {}
        self._iteration = 0
        self._micro_step = 0

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        """See ``DistributionMatching.step``; ``video_frame`` is where the newest window ends."""
        self._micro_step = self._micro_step + 1 if iteration == self._iteration else 0
        self._iteration = iteration
        result = self._matching.step(batch, iteration)
        frame = torch.tensor(float(self._videos[self._micro_step].next_frame))
        return StepResult(result.loss_map, {**result.outputs, "video_frame": frame})

    def rank_state(self) -> dict[str, object]:
        """See ``DistillMethod.rank_state``: the videos of this process."""
        return {
            str(number): _VideoState(
                cond=dict(video.cond.tensors),
                shape=list(video.shape),
                next_frame=video.next_frame,
                tail=video.tail,
                past=self._causal.past_state("student", stream=_stream(number)),
            )
            for number, video in self._videos.items()
        }

    def load_rank_state(self, state: Mapping[str, object]) -> None:
        """See ``DistillMethod.load_rank_state``."""
        for number in self._videos:
            self._causal.clear_caches("student", stream=_stream(number))
        self._videos, self._iteration = {}, 0
        device = self.context.device
        for number, value in ((int(key), cast(_VideoState, one)) for key, one in state.items()):
            cond = Condition(dict(value["cond"])).to(device)
            tail = value["tail"]
            self._videos[number] = Video(
                cond=cond,
                shape=tuple(value["shape"]),
                next_frame=value["next_frame"],
                tail=None if tail is None else tail.to(device),
            )
            self._causal.load_past("student", value["past"], cond, stream=_stream(number))

    def _rollout(self, batch: Batch, turn: str, iteration: int) -> Rollout:
        """Extend the video of this micro step by a window."""
        purpose, size = f"{self.name}.{turn}", len(batch)
        stream = _stream(self._micro_step)
        video = self._video_for(batch, purpose)
        channels, clip_frames, height, width = batch.latent_shape
        overlap = self.config.overlap_frames
        frames = clip_frames - (0 if video.tail is None else overlap)
        first, stop = video.next_frame, video.next_frame + frames
        chunks = [chunk for chunk in self._divide(stop) if chunk.first >= first]
        allowed = allowed_exit_steps(self.context, self.config, purpose, iteration)
        k = self.noise.sample_shared_exit(f"{purpose}.exit_step", allowed)
        new = self._causal.extend(
            "student",
            self.config.student_sampler,
            standard_noise(
                (channels, frames, height, width),
                self.streams.rows(f"{purpose}.rollout", size),
                batch.device,
            ),
            video.cond,
            first_frame=first,
            stream=stream,
            exit_steps=(k,) * len(chunks),
            generators=self.streams.rows(f"{purpose}.rollout.fresh", size),
            poll=self.context.poll,
        )
        window, loss_mask = new, None
        if video.tail is not None:
            window = torch.cat([video.tail, new], dim=2)
            loss_mask = torch.ones(1, 1, clip_frames, 1, 1, device=batch.device)
            loss_mask[:, :, :overlap] = 0
        tail = window[:, :, -overlap:].detach() if overlap else None
        self._videos[self._micro_step] = evolve(video, next_frame=stop, tail=tail)
        return Rollout(
            window,
            torch.full((size,), float(k), device=batch.device),
            torch.tensor([[k]]),
            loss_mask=loss_mask,
            same_on_all_ranks=True,
            cond=video.cond,
        )

    def _video_for(self, batch: Batch, purpose: str) -> Video:
        """Return the video to extend: that of this micro step, perhaps under other prompts, or a
        new one."""
        stream = _stream(self._micro_step)
        video = self._videos.get(self._micro_step)
        shape = tuple(batch.latent_shape)
        ends = window_ends(self.config, shape[1])
        if (
            video is None
            or video.next_frame >= ends[-1]
            or video.shape != shape
            or len(video.cond) != len(batch)
        ):
            self._causal.clear_caches("student", stream=stream)
            return Video(cond=batch.cond, shape=shape)
        p = self.config.switch_probability
        if not p:
            return video
        # The same on all ranks: a switch makes calls.
        u = torch.rand((), generator=self.streams.get(f"{purpose}.switch", shared=True))
        if float(u) >= p:
            return video
        self.context.poll()
        self._causal.rebuild_past("student", batch.cond, stream=stream)
        return evolve(video, cond=batch.cond)

    def _divide(self, frames: int) -> tuple[Chunk, ...]:
        return self._causal.chunks("student", frames)


def _stream(number: int) -> str:
    """Return the name of the past of a micro step's video."""
    return f"video {number}"
