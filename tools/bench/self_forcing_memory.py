"""Does a Self-Forcing step keep more in memory the more denoising steps its student has?

    uv run python tools/bench/self_forcing_memory.py [--steps 2 4 8 16] [--chunks 7]

A student's step of the tiny Wan (at 128 x 128 pixels, chunks of 3 latent frames), each number of
steps in a process of its own, taken at the last step, so with the most calls. Two figures for each:

- saved: the bytes that its graph keeps for the backward pass, weights included, counted exactly.
- peak: how far the process's resident memory rose above what it was before its first step.

For comparison, the last lines: what a graph through all of a chunk's calls would keep.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from distill_adapters_wan import PLUGIN, CausalConfig, WanAdapter, WanPipelineConfig
from distill_methods import SelfForcingConfig, SelfForcingMethod
from distill_protocols import (
    Batch,
    ChunkCall,
    Condition,
    ModelBundle,
    RandomStreams,
    RoleSpec,
    SamplerSpec,
)
from torch import Tensor

WAN = str(Path(__file__).resolve().parents[2] / "configs" / "tiny" / "wan")
CHUNK, TEXT = 3, (8, 64)


class Conditioning:
    def negative(self) -> Condition:
        return Condition({"text": torch.zeros(1, *TEXT)})

    def encode(
        self,
        prompts: Sequence[str],
        images: Tensor | None = None,
        last_images: Tensor | None = None,
    ) -> Condition:
        raise NotImplementedError


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--chunks", type=int, default=7)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one is not None:
        print(json.dumps(measure(args.one, args.chunks)))
        return
    found = {steps: in_a_process(steps, args.chunks) for steps in args.steps}
    first = found[args.steps[0]]
    print(f"student's step, {args.chunks} chunks of {CHUNK} frames; MB, and in parts of the first")
    for name in ("saved", "peak", "saved through all steps"):
        for steps, of in found.items():
            ratio = of[name] / first[name]
            print(f"  {name:24} {steps:3} steps  {of[name] / 1e6:8.2f} MB  {ratio:6.3f}")


def in_a_process(steps: int, chunks: int) -> dict[str, int]:
    command = [sys.executable, __file__, "--one", str(steps), "--chunks", str(chunks)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(steps: int, chunks: int) -> dict[str, int]:
    """Return bytes by the names that ``main`` prints."""
    frames = CHUNK * chunks
    bundle, pipeline = roles(frames)
    spec = SamplerSpec(steps=steps, shift=3.0, stochastic=True)
    before = resident_bytes()
    run_turn(method(bundle, pipeline, spec))
    peak = peak_bytes() - before
    saved = saved_bytes(lambda: run_turn(method(bundle, pipeline, spec)))
    adapter = WanAdapter(bundle, PLUGIN, pipeline, source=WAN)
    batch = clips(adapter)
    through = saved_bytes(lambda: call_with_all_gradients(adapter, spec, batch))
    return {"saved": saved, "peak": peak, "saved through all steps": through}


def roles(frames: int) -> tuple[ModelBundle, WanPipelineConfig]:
    causal = CausalConfig(roles=("student",), chunk_frames=CHUNK)
    pipeline = WanPipelineConfig(
        num_frames=4 * (frames - 1) + 1, height=128, width=128, max_sequence_length=8, causal=causal
    )
    specs = [
        RoleSpec(name=name, path=WAN, trainable=name != "teacher")
        for name in ("student", "teacher", "critic")
    ]
    return PLUGIN.load(specs, pipeline, device=torch.device("cpu")), pipeline


def method(
    bundle: ModelBundle, pipeline: WanPipelineConfig, spec: SamplerSpec
) -> SelfForcingMethod:
    config = SelfForcingConfig(
        student_sampler=spec, last_step_only=True, real_score_guidance_scale=1.5
    )
    adapter = WanAdapter(bundle, PLUGIN, pipeline, source=WAN)
    return SelfForcingMethod(
        bundle, adapter, config, conditioning=Conditioning(), streams=RandomStreams(0)
    )


def clips(adapter: WanAdapter) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        latents=torch.randn(1, *adapter.latent_shape, generator=generator),
        cond=Condition({"text": torch.randn(1, *TEXT, generator=generator)}),
        ids=("a",),
    )


def run_turn(made: SelfForcingMethod) -> None:
    """Run one student's turn, forward and backward."""
    result = made.single_train_step(
        clips(made.adapter),  # type: ignore[arg-type]
        made.config.generator_update_interval,
    )
    result.loss_map["total_loss"].backward()
    for module in made.model_dict.values():
        module.zero_grad(set_to_none=True)


def call_with_all_gradients(adapter: WanAdapter, spec: SamplerSpec, batch: Batch) -> Tensor:
    """Make every call of a chunk with gradient, chunk by chunk."""
    out = []
    for chunk in adapter.chunks("student"):
        x, call = batch.latents[:, :, chunk.span], ChunkCall(first_frame=chunk.first)
        for sigma, after in zip(spec.sigmas(), (*spec.sigmas()[1:], 0.0), strict=True):
            v = adapter.forward("student", x, torch.full((1,), 1000 * sigma), batch.cond,
                                caches=call)  # fmt: skip
            x = x + (after - sigma) * v
        out.append(x)
        with torch.no_grad():
            store = ChunkCall(first_frame=chunk.first, store=True)
            adapter.forward("student", x, torch.zeros(1), batch.cond, caches=store)
    adapter.clear_caches("student")
    return torch.cat(out, dim=2)


def saved_bytes(turn: Callable[[], object]) -> int:
    """Count the storages that graphs made in ``turn`` keep for their backward pass."""
    storages: dict[int, int] = {}
    kept: list[Tensor] = []  # alive until counted, so that no address is used twice

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(value.detach())
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        result = turn()
    del result
    kept.clear()
    return sum(storages.values())


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
