"""Does a chunk of a streamed video cost more the later it comes? Time, cached bytes, memory.

    uv run python tools/bench/streaming.py [--pairs 30] [--ahead 60]

Two streams of the tiny Wan (at 128 x 128 pixels: 64 tokens a latent frame) take turns chunk by
chunk, one just past its window and one ``--ahead`` chunks further: what is compared is the CPU time
of neighbouring chunks, so that a busy box slows both alike. Beside it, what the window saves: the
same without one, as far as the model's positions reach.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import time
from collections.abc import Generator
from pathlib import Path

import torch
from distill_adapters_wan import PLUGIN, CausalConfig, WanAdapter, WanPipelineConfig
from distill_protocols import Condition, RoleSpec, SamplerSpec
from torch import Tensor

WAN = str(Path(__file__).resolve().parents[2] / "configs" / "tiny" / "wan")
Video = Generator[Tensor, None, None]
CHUNK, WINDOW, SINK, SPEC = 3, 9, 3, SamplerSpec(steps=2, shift=3.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--ahead", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)

    adapter = causal_adapter(window_frames=WINDOW, sink_frames=SINK)
    early, late = stream(adapter), stream(adapter)
    advance(early, WINDOW // CHUNK + 1)
    advance(late, WINDOW // CHUNK + 1 + args.ahead)
    before, peak = adapter.cached_bytes("student"), peak_bytes()
    pairs = [(seconds(early), seconds(late)) for _ in range(args.pairs)]
    print(f"window {WINDOW} frames (sink {SINK}), chunks of {CHUNK}, {SPEC.steps} steps")
    report("late chunk / early chunk", pairs, f"{args.ahead} chunks apart")
    print(
        f"  cached, both streams     {before / 1e6:.2f} MB, {args.pairs} chunks later "
        f"{adapter.cached_bytes('student') / 1e6:.2f} MB"
    )
    print(f"  peak memory of the process grew by {(peak_bytes() - peak) / 1e6:.1f} MB meanwhile")

    adapter = causal_adapter()
    rounds, cached = [], 0
    for _ in range(max(3, args.pairs // 6)):
        video = stream(adapter)
        times = [seconds(video) for _ in range(10)]
        rounds.append((statistics.mean(times[1:3]), statistics.mean(times[8:10])))
        cached = adapter.cached_bytes("student")
        video.close()
    print("no window")
    report("chunks 9-10 / chunks 2-3", rounds, f"cached {cached / 1e6:.2f} MB after 10 chunks")


def causal_adapter(window_frames: int | None = None, sink_frames: int = 0) -> WanAdapter:
    section = CausalConfig(
        roles=("student",), chunk_frames=CHUNK, window_frames=window_frames, sink_frames=sink_frames
    )
    config = WanPipelineConfig(
        num_frames=9, height=128, width=128, max_sequence_length=8, causal=section
    )
    role = RoleSpec(name="student", path=WAN, trainable=False)
    bundle = PLUGIN.load([role], config, device=torch.device("cpu"))
    return WanAdapter(bundle, PLUGIN, config, source=WAN)


def stream(adapter: WanAdapter) -> Video:
    channels, _, height, width = adapter.latent_shape
    generator = torch.Generator().manual_seed(0)
    noises = (
        torch.randn(1, channels, CHUNK, height, width, generator=generator)
        for _ in itertools.count()
    )
    text = Condition({"text": torch.randn(1, 8, 64, generator=generator)})
    return adapter.stream("student", SPEC, noises, text)


def advance(video: Video, chunks: int) -> None:
    for _ in range(chunks):
        next(video)


def seconds(video: Video) -> float:
    """CPU seconds of the next chunk: storing the one before it, and its own steps."""
    start = time.process_time()
    next(video)
    return time.process_time() - start


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(name: str, pairs: list[tuple[float, float]], note: str) -> None:
    ratios = sorted(b / a for a, b in pairs)
    ms = [1000 * statistics.median(times) for times in zip(*pairs, strict=True)]
    quarter = len(ratios) // 4
    print(
        f"  {name} median {statistics.median(ratios):.3f} "
        f"(quartiles {ratios[quarter]:.3f} - {ratios[-1 - quarter]:.3f}, {len(ratios)} pairs; "
        f"{ms[0]:.0f} ms, {ms[1]:.0f} ms; {note})"
    )


if __name__ == "__main__":
    main()
