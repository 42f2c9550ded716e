"""A few clips of the same prompts from the same noise, as numbers.

Prompts are divided among the ranks of a run, each with all of its clips, and all ranks get the
numbers of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from attrs import frozen
from distill_protocols import (
    DataError,
    DistillAdapter,
    RankGroup,
    RowGenerators,
    RunParts,
    SamplerSpec,
    draw_noise,
    main_part,
    map_latents,
)
from distill_runtime import RowPartition
from torch import Tensor

from distill_evaluation.measures import (
    clipped_share,
    contrast,
    flow_magnitude,
    frame_difference,
    pair_distances,
    saturation,
    sharpness,
)

FLOW_PAIRS = 2
"""Pairs of neighbouring frames of a clip whose optical flow is measured."""


def flow_of_some(clips: Tensor) -> Tensor:
    """Measure the length of the optical flow of clips [N, 3, F, H_px, W_px], [N] in pixels a frame.

    Of a few pairs of frames, evenly spread: all of them would take longer than decoding does.
    """
    pairs = clips.shape[2] - 1
    starts = {(2 * i + 1) * pairs // (2 * FLOW_PAIRS) for i in range(FLOW_PAIRS)}
    return torch.stack([flow_magnitude(clips[:, :, i : i + 2]) for i in sorted(starts)]).mean(0)


OF_PIXELS: dict[str, Callable[[Tensor], Tensor]] = {
    "contrast": contrast,
    "saturation": saturation,
    "clipped": clipped_share,
    "sharpness": sharpness,
    "motion": frame_difference,
    "flow": flow_of_some,
}
"""Measures of decoded clips by name, one number a clip."""
LEAST_SIDE = 4
"""Shortest side of frames that all of them take."""


@frozen(kw_only=True)
class Sampled:
    """Who samples, and how."""

    role: str
    sampler: SamplerSpec


class Probe:
    """Samples and measures; the run goes on as if nothing had been sampled.

    Noise follows from ``seed`` and a clip's place alone; weights, modes and generators of the run
    stay as they are. Conditions and real clips are the first samples of the run's data.

    Args:
        teacher: its role is asked how far clips are from those that it makes; None: nobody is.
        times: t at which it is asked.

    Raises:
        DataError: the run has no examples.
    """

    def __init__(
        self,
        parts: RunParts,
        *,
        prompts: int,
        clips_per_prompt: int,
        seed: int,
        teacher: str | None,
        times: Sequence[float],
    ) -> None:
        if parts.examples is None:
            raise DataError("clips cannot be probed in a run without a data set")
        self._parts = parts
        self._each = clips_per_prompt
        self._seed = seed
        self._examples = parts.examples(prompts)
        self._teacher = teacher
        self._times = () if teacher is None else _callable_times(parts.adapter, teacher, times)
        if parts.adapter.capabilities.supports_latent_parts:
            self._times = ()  # a teacher reads all parts, and what is measured is the main one
        self._decodes = not parts.adapter.capabilities.missing(["supports_decode"])

    def measure(self, who: Sampled, ranks: RankGroup) -> dict[str, float]:
        """Sample clips of a role, and return their numbers by name; the same on all ranks."""
        partition = RowPartition(ranks, len(self._examples))
        rows = [prompt * self._each + i for prompt in partition.own for i in range(self._each)]
        prompts = [prompt for prompt in partition.own for _ in range(self._each)]
        latents = torch.cat(
            [
                self._sample(who, rows[i : i + self._at_once], prompts[i : i + self._at_once])
                for i in range(0, len(rows), self._at_once)
            ]
        )
        return self._numbers(latents, rows, prompts, partition, self._each)

    def measure_data(self, ranks: RankGroup) -> dict[str, float]:
        """Return the numbers of the real clips of the same prompts; empty: the data have none."""
        if self._examples.latents is None:
            return {}
        partition = RowPartition(ranks, len(self._examples))
        rows = torch.tensor(partition.own)
        own = map_latents(lambda latents: latents[rows], self._examples.latents)
        latents = main_part(self._parts.adapter.normalize_latents(own))
        return self._numbers(latents, partition.own, partition.own, partition, 1)

    # -- inside -------------------------------------------------------------------------------

    @property
    def _at_once(self) -> int:
        return max(1, self._parts.micro_batch)

    def _sample(self, who: Sampled, rows: Sequence[int], prompts: Sequence[int]) -> Tensor:
        parts, cond = self._parts, self._examples.cond[torch.tensor(prompts)]
        role = parts.method.bundle[who.role]
        # On the CPU, so that a seed means the same clips on every device.
        generators = RowGenerators.seeded(self._seed, "health.sample", rows)
        device = role.call_device
        noise = map_latents(
            lambda tensor: tensor.to(device),
            draw_noise(parts.adapter, self._examples.latent_shape, generators),
        )
        reads_negative = parts.adapter.capabilities.reads_negative(*who.sampler.guidances)
        negative = parts.conditioning.negative() if reads_negative else None
        with torch.no_grad(), role.frozen():
            clips = parts.adapter.sample(
                who.role,
                who.sampler,
                noise,
                cond.to(device),
                neg_cond=None if negative is None else negative.to(device),
                generators=generators,
                poll=parts.method.stop.poll,
            )
        return main_part(clips)

    def _numbers(
        self,
        latents: Tensor,
        rows: Sequence[int],
        prompts: Sequence[int],
        partition: RowPartition,
        each: int,
    ) -> dict[str, float]:
        """Measure this rank's clips, and put those of all ranks together."""
        flat = latents.double().flatten(1)
        columns = {"latent_mean": flat.mean(1), "latent_square": flat.square().mean(1)}
        for t, distances in zip(self._times, self._distances(latents, rows, prompts), strict=True):
            columns[f"teacher_distance/{t:g}"] = distances
        of_clips = _table(columns).unflatten(0, (-1, each)).mean(1)
        # One clip of each prompt: decoding takes far longer than a model call.
        clips = self._decode(latents[::each])
        seen = {} if clips is None else {n: measure(clips) for n, measure in OF_PIXELS.items()}
        if each > 1:
            # Groups by place and not by prompt: the last prompt may be there twice to fill a rank.
            groups = torch.arange(len(partition.own), device=latents.device)
            seen["variety"] = pair_distances(latents, groups.repeat_interleave(each))
        names = [*columns, *seen]
        gathered = partition.gather(torch.cat([of_clips, _table(seen, len(of_clips))], dim=1))

        def means() -> dict[str, float]:
            assert gathered is not None
            numbers = dict(zip(names, gathered.mean(0).tolist(), strict=True))
            # Of all numbers of all clips around their one mean.
            square = numbers.pop("latent_square") - numbers["latent_mean"] ** 2
            numbers["latent_std"] = max(0.0, square) ** 0.5
            if each > 1:
                # Independent clips are sqrt(2) standard deviations apart.
                numbers["variety"] /= max(1e-12, 2**0.5 * numbers["latent_std"])
            return numbers

        return partition.ranks.run_on_first(means)

    def _distances(
        self, latents: Tensor, rows: Sequence[int], prompts: Sequence[int]
    ) -> list[Tensor]:
        """Compute ``mean |x - x0_teacher(x_t, t)|`` of each clip x, unguided, at each of the times.

        It is what DMD's gradient is divided by (Yin et al. 2023, eq. 8): how much the teacher would
        change of a clip that was noised. The noise is the same each time.
        """
        if self._teacher is None or not self._times:
            return []
        adapter, role = self._parts.adapter, self._parts.method.bundle[self._teacher]
        noise = RowGenerators.seeded(self._seed, "health.noise", rows).normal(latents.shape[1:])
        columns = []
        for time in self._times:
            parts = []
            for i in range(0, len(rows), self._at_once):
                self._parts.method.stop.poll()
                x = latents[i : i + self._at_once]
                t = torch.full((len(x),), float(time), device=x.device)
                cond = self._examples.cond[torch.tensor(prompts[i : i + self._at_once])]
                x_t = adapter.add_noise(x, noise[i : i + self._at_once].to(x.device), t)
                with torch.no_grad(), role.frozen():
                    x0 = adapter.forward(
                        self._teacher, x_t, t, cond.to(x.device), fwd_pred_type="x0"
                    )
                parts.append((x - x0).abs().flatten(1).mean(1))
            columns.append(torch.cat(parts))
        return columns

    def _decode(self, latents: Tensor) -> Tensor | None:
        if not self._decodes:
            return None
        clips = []
        for part in latents.split(self._at_once):
            self._parts.method.stop.poll()
            # Off the device: clips are far larger than latents.
            clips.append(self._parts.adapter.decode(part).float().cpu())
        decoded = torch.cat(clips)
        return decoded if min(decoded.shape[-2:]) >= LEAST_SIDE else None


def _table(columns: Mapping[str, Tensor], rows: int = 0) -> Tensor:
    """Return numbers [rows, columns], float64, on the CPU."""
    if not columns:
        return torch.zeros(rows, 0, dtype=torch.float64)
    return torch.stack([column.double().cpu() for column in columns.values()], dim=1)


def can_sample(adapter: DistillAdapter, who: Sampled) -> bool:
    """Return whether the role has all experts that its sampler calls: one of two has not."""
    if adapter.experts is None:
        return True
    times = [1000 * sigma for sigma in who.sampler.sigmas()]
    if adapter.causal is not None and len(adapter.causal.chunks(who.role)) > 1:
        times.append(who.sampler.context_noise)
    return len(_callable_times(adapter, who.role, times)) == len(times)


def _callable_times(
    adapter: DistillAdapter, role: str, times: Sequence[float]
) -> tuple[float, ...]:
    """Return those of ``times`` at which ``role`` has an expert."""
    if adapter.experts is None:
        return tuple(times)
    ranges = adapter.experts.expert_ranges(role)
    return tuple(
        t for t in times if any(low <= t < high or t == high == 1000 for low, high in ranges)
    )
