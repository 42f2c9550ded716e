"""From a checked request to a data set: the clips and their trajectories."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from attrs import define, evolve
from distill_checkpoint import read_start_weights
from distill_conditioning import (
    CachedConditioning,
    LatentDataset,
    ShardRows,
    TrajectoryFolder,
)
from distill_protocols import Condition, DistillAdapter, RowGenerators, draw_noise, one_tensor
from distill_runfile import SampledConfig, to_plain
from distill_runfile.progress import Progress
from distill_runtime import Worker, claim_folder, counted, readable_bytes, sigterm_as_interrupt
from torch import Tensor

from distill_trajectories.config import TrajectoriesConfig

_log = logging.getLogger(__name__)


def run(config: SampledConfig[TrajectoriesConfig]) -> bool:
    """Make what is missing of the data set; returns whether it is complete now.

    Raises:
        DistillError: whatever is wrong with weights, data or folder.
    """
    own = config.section
    if own.cpu_threads is not None:
        torch.set_num_threads(own.cpu_threads)
    with sigterm_as_interrupt():  # complete shards stay: the next start goes on with them
        source, worker = LatentDataset(config.data), Worker.of_this_process()
        # By the number of the process: the others of its torchrun write there too.
        with claim_folder(Path(own.output_dir), f"worker-{worker.rank}"):
            return _make(config, own, source, worker)


def _make(
    config: SampledConfig[TrajectoriesConfig],
    own: TrajectoriesConfig,
    source: LatentDataset,
    worker: Worker,
) -> bool:
    folder = _folder(config, own, source)
    if folder.complete():
        _log.info("nothing to do: %s is whole", own.output_dir)
        return True
    device = worker.device()
    spec = config.role.spec
    start = config.role.init_from
    weights = {}
    if start is not None:
        _log.info("%s starts from %s%s", spec.name, start.path, " (EMA)" if start.ema else "")
        weights[spec.name] = read_start_weights(
            start.path,
            start.role or spec.name,
            ema=start.ema,
            family=config.family_plugin,
            spec=spec,
        )
    bundle = config.family_plugin.load([spec], config.pipeline, device=device, weights=weights)
    adapter = config.family_plugin.adapter(bundle, config.pipeline, source=config.source)
    conditioning = CachedConditioning(
        config.conditioning,
        encoder=adapter,
        dataset=source,
        output_dir=own.output_dir,
        device=device,
    )
    negative = _negative(config, source, conditioning)
    teacher = Teacher(
        adapter=adapter,
        role=spec.name,
        config=own,
        source=source,
        negative=negative[1].to(device) if negative else None,
        device=device,
    )
    missing = folder.missing(worker.rank, worker.size)
    _log.info("%s", _opening(config, own, folder, worker, missing, device))
    for note in config.notes:
        _log.info("%s", note)
    progress = Progress(sum(len(folder.span(shard)) for shard in missing), "clips", _log)
    for shard in missing:
        rows = ShardRows()
        span = folder.span(shard)
        for first in range(0, len(span), own.batch_size):
            numbers = span[first : first + own.batch_size]
            teacher.add(folder, rows, numbers)
            progress.advance(len(numbers))
        folder.write(shard, rows)
    index = folder.finish(negative=negative, fingerprint=source.computed_by)
    if index is None:
        left = len(folder.missing())
        _log.info(
            "this process is done; %s with others",
            counted(left, "shard is still", "shards are still"),
        )
        return False
    size = sum(entry.bytes for entry in index.shards)
    _log.info(
        "%s with x_t at t = %s in %s, %s: %s",
        counted(index.samples, "clip"),
        ", ".join(f"{t:g}" for t in own.times),
        counted(len(index.shards), "shard"),
        readable_bytes(size),
        own.output_dir,
    )
    return True


@define(eq=False, kw_only=True)
class Teacher:
    """Samples clips by number, and keeps states of their trajectories."""

    adapter: DistillAdapter
    role: str
    config: TrajectoriesConfig
    source: LatentDataset
    negative: Condition | None
    device: torch.device

    def add(self, folder: TrajectoryFolder, rows: ShardRows, numbers: Sequence[int]) -> None:
        """Sample clips ``numbers`` and add them to ``rows``."""
        places = [number % len(self.source) for number in numbers]
        cond = self.source.read_conditions(torch.tensor(places))
        captions = [self.source.caption(place) for place in places]
        latents, states = self.sample(numbers, cond)
        folder.add(rows, numbers, captions, cond, latents, states)

    def sample(self, numbers: Sequence[int], cond: Condition) -> tuple[Tensor, Tensor]:
        """Sample clips: raw latents [B, C, T, H, W], and states [B, K, C, T, H, W] at the kept
        levels, on the CPU."""
        states: dict[int, Tensor] = {}

        def keep(step: int, x_t: Tensor) -> None:
            if step in self.config.steps:
                states[step] = x_t.cpu()

        noise = RowGenerators.seeded(self.config.seed, "trajectories.noise", numbers)
        clean = self.adapter.sample(
            self.role,
            self.config.sampler,
            one_tensor(draw_noise(self.adapter, self.adapter.latent_shape, noise)).to(self.device),
            cond.to(self.device),
            neg_cond=self.negative,
            on_step=keep,
        )
        kept = torch.stack([states[step] for step in self.config.steps], dim=1)
        return self.adapter.denormalize_latents(clean).cpu(), kept


def settings(config: SampledConfig[TrajectoriesConfig], source: LatentDataset) -> dict[str, object]:
    """Collect all that decides a sample: what a folder must have been begun with to go on."""
    own = config.section
    spec = config.role.spec
    start = config.role.init_from
    return {
        "family": config.recipe.family,
        "role": {
            "path": spec.path,
            "precision": spec.precision,
            "lora": None if spec.lora is None else to_plain(spec.lora),
            "init_from": None if start is None else to_plain(start),
        },
        "pipeline_config": to_plain(config.pipeline),
        # Without the fingerprint, which earlier releases did not record: their folders go on.
        "captions": hashlib.sha256(
            "".join(evolve(one.index, fingerprint={}).to_json() for one in source.sources).encode()
        ).hexdigest(),
        "negative_prompt": config.conditioning.negative_prompt,
        "sampler": to_plain(own.sampler),
        "times": list(own.times),
        "seed": own.seed,
        # The bits of a clip depend on how many are computed together.
        "batch_size": own.batch_size,
        "samples_per_shard": own.samples_per_shard,
        "dtype": own.dtype,
    }


def _folder(
    config: SampledConfig[TrajectoriesConfig], own: TrajectoriesConfig, source: LatentDataset
) -> TrajectoryFolder:
    return TrajectoryFolder(
        own.output_dir,
        settings=settings(config, source),
        times=own.times,
        samples=own.samples(len(source)),
        samples_per_shard=own.samples_per_shard,
        ids=_ids(source),
        dtype=own.dtype,
    )


def _ids(source: LatentDataset) -> Callable[[int], str]:
    def name(number: int) -> str:
        repeat, sample = divmod(number, len(source))
        return f"{source.id(sample)}.{repeat}"

    return name


def _negative(
    config: SampledConfig[TrajectoriesConfig],
    source: LatentDataset,
    conditioning: CachedConditioning,
) -> tuple[str, Condition] | None:
    """Prompt and condition, to guide with and to store beside the clips; None: there is none."""
    prompt = config.conditioning.negative_prompt
    if prompt is None:
        stored = source.negative()
        if stored is None:
            return None
        prompt = stored.prompt
    return prompt, conditioning.negative().to("cpu")


def _opening(
    config: SampledConfig[TrajectoriesConfig],
    own: TrajectoriesConfig,
    folder: TrajectoryFolder,
    worker: Worker,
    missing: list[int],
    device: torch.device,
) -> str:
    own_shards = len(range(worker.rank, folder.shards, worker.size))
    who = f"process {worker.rank} of {worker.size}: " if worker.size > 1 else ""
    return (
        f"{config.role.spec.name} ({config.role.spec.precision}, {config.role.spec.path}) on "
        f"{device}, {own.sampler.calls_per_clip} calls a clip\n"
        f"{who}{own_shards - len(missing)} of {counted(own_shards, 'shard')} are there, "
        f"{len(missing)} to make, into {own.output_dir}"
    )
