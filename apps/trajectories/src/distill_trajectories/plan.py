"""What would be made, without weights: the text of ``--dry-run``. No torch."""

from __future__ import annotations

from math import prod
from pathlib import Path

from distill_conditioning import data_info
from distill_runfile import SampledConfig
from distill_runtime import counted, readable_bytes

from distill_trajectories.config import TrajectoriesConfig

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def describe(config: SampledConfig[TrajectoriesConfig]) -> str:
    """Describe the request as text."""
    own = config.section
    spec = config.role.spec
    lines = [
        f"trajectories of {spec.name} on {config.recipe.family}: {spec.path}, {spec.precision}",
        f"  {own.sampler.steps} steps, guidance {own.sampler.guidance:g}, "
        f"{own.sampler.calls_per_clip} model calls a clip",
        f"  kept: x_t at t = {', '.join(f'{t:.6g}' for t in own.times)}, and the clip",
        *_size(config, own),
        f"  into {own.output_dir}",
        *(f"  {note}" for note in config.notes),
    ]
    return "\n".join(lines)


def _size(config: SampledConfig[TrajectoriesConfig], own: TrajectoriesConfig) -> list[str]:
    shape = config.family_plugin.latent_shape(config.pipeline, source=config.source)
    size = 0
    if shape is not None:
        size = prod(shape) * _BYTES[own.dtype] * (1 + len(own.steps))
    absent = [one.path for one in config.data.all_sets if not Path(one.path).exists()]
    if absent:
        each = f"; {readable_bytes(size)} a clip and its caption" if size else ""
        return [
            f"  the captions' data set is not on this machine yet: {path}{each}" for path in absent
        ]
    samples = own.samples(data_info(config.data).samples)
    shards = -(-samples // own.samples_per_shard)
    text = f", {readable_bytes(samples * size)} and captions" if size else ""
    return [f"  {counted(samples, 'clip')} in {counted(shards, 'shard')}{text}"]
