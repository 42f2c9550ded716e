"""Preprocessing: does the VAE wait for the decoder, and does memory stay flat?

    uv run python tools/bench/preprocess.py [--samples 10000]

Two measurements with the shipped tiny Wan, on the CPU:

- Throughput: the slower of decoder and VAE alone, against both together. The VAE is one that sleeps
  as long as a clip takes on an accelerator, because on a CPU both would use the same cores.
- Memory: resident size while so many samples are made by the real VAE.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
import yaml  # noqa: E402
from distill_conditioning import UnitFolder  # noqa: E402
from distill_media import decode_clips, read_items  # noqa: E402
from distill_media.clips import group_clips, plan_clips  # noqa: E402
from distill_preprocess.encoding import Encoder, to_video  # noqa: E402
from distill_preprocess.request import Request, buckets_of, cut_of, read_request  # noqa: E402
from distill_preprocess.run import run  # noqa: E402
from media_files import moving_frames, write_video  # noqa: E402
from preprocess_requests import write_request  # noqa: E402


def write_clips(folder: Path, count: int, frames: int, height: int, width: int) -> None:
    for number in range(count):
        path = write_video(
            folder / f"clips/{number:04d}.mp4", moving_frames(frames, height, width, seed=number)
        )
        path.with_suffix(".txt").write_text(f"the digit {number % 9}")


def request(folder: Path, name: str, **changes: object) -> Request:
    file = write_request(folder, output_dir=f"./{name}", **changes)
    values = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(values))
    return read_request(file)


def decode_alone(config: Request) -> float:
    """Seconds that one thread takes to decode all clips."""
    began = time.perf_counter()
    for item in read_items(config.section.sources, config.section.captions):
        for group in group_clips(plan_clips(item, buckets_of(config), cut_of(config))):
            decode_clips(group, cut_of(config))
    return time.perf_counter() - began


@contextlib.contextmanager
def sleeping_vae(seconds: float) -> Iterator[list[tuple[float, float]]]:
    """Within: encoding a clip sleeps, as a thread does that waits for an accelerator. Yields when
    each encoding began and ended."""
    encode, spent = Encoder.encode_clips, []

    def sleep(encoder: Encoder, clips):
        began = time.perf_counter()
        latents = torch.zeros(len(clips), *encoder.adapter.latent_shape)
        time.sleep(seconds)
        spent.append((began, time.perf_counter()))
        return latents, to_video(clips)

    Encoder.encode_clips = sleep  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        Encoder.encode_clips = encode  # type: ignore[method-assign]


def measure_throughput(folder: Path, clips: int) -> None:
    write_clips(folder, clips, 60, 480, 640)
    common = {"batch_size": 1, "items_per_unit": 8, "clips": {"fps": 8}}
    alone = decode_alone(request(folder, "unused", **common)) / clips
    print(f"decoder alone, one thread: {1000 * alone:.0f} ms a clip")
    for ratio in (0.5, 2.0):
        with sleeping_vae(ratio * alone) as spent:
            run(request(folder, f"data-{ratio}", decode_workers=1, **common))
        total = spent[-1][1] - spent[0][0]
        vae = sum(end - begin for begin, end in spent)
        slower = max(vae, alone * clips)
        print(
            f"VAE {1000 * vae / clips:.0f} ms a clip: together {1000 * total / clips:.0f} ms, from "
            f"the first clip to the last; {100 * slower / total:.0f} % of the slower of the two"
        )


def resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure_memory(folder: Path, samples: int) -> None:
    each = 100
    write_clips(folder, -(-samples // each), 9 * each, 48, 48)
    sizes: list[float] = []
    finish = UnitFolder.finish_unit

    def measured(*given) -> None:
        finish(*given)
        sizes.append(resident())

    UnitFolder.finish_unit = measured  # type: ignore[method-assign]
    config = request(
        folder, "data", batch_size=10, items_per_unit=1, clips={"fps": 8, "take": "windows"}
    )
    began = time.perf_counter()
    run(config)
    seconds = time.perf_counter() - began
    tenth = max(1, len(sizes) // 10)
    parts = [statistics.mean(sizes[i : i + tenth]) for i in range(0, len(sizes), tenth)]
    print(f"{samples} samples in {seconds:.0f} s; resident MB, by tenths of the run:")
    print("  " + " ".join(f"{part:.0f}" for part in parts))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--clips", type=int, default=48)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        measure_throughput(Path(name) / "throughput", arguments.clips)
        measure_memory(Path(name) / "memory", arguments.samples)


if __name__ == "__main__":
    main()
