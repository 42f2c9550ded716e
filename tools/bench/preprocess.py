"""Preprocessing: does anything wait but for the slower of decoder and VAE, and is memory flat?

    uv run python tools/bench/preprocess.py [--clips 12] [--samples 10000]

- Throughput: 720p videos become clips of 32 x 32 by the shipped tiny VAE, and of 480 x 832 by one
  that sleeps as long as a clip takes on an accelerator. Decoding alone (from a path to the clip's
  RGB frames: its index, its frames, their scaling, what is odd about it) and the VAE alone are
  measured in the same run; one thread decodes. PyAV alone (every frame up to the last that is
  taken, neither scaled nor made RGB) stands beside it. On a busy machine CPU time says what wall
  time cannot: whatever a thread does beside its own work.
- Memory: resident size while so many samples are made by the tiny VAE.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import av  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from distill_conditioning import UnitFolder  # noqa: E402
from distill_media import (  # noqa: E402
    MediaClip,
    PlannedClip,
    decode_clips,
    find_notes,
    group_clips,
    plan_clips,
    read_items,
)
from distill_preprocess.encoding import Encoder  # noqa: E402
from distill_preprocess.request import Request, buckets_of, cut_of, read_request  # noqa: E402
from distill_preprocess.run import run  # noqa: E402
from media_files import moving_frames, write_video  # noqa: E402
from preprocess_requests import TINY, write_request  # noqa: E402


def write_clips(folder: Path, count: int, frames: int, height: int, width: int) -> None:
    for number in range(count):
        path = write_video(
            folder / f"clips/{number:04d}.mp4",
            moving_frames(frames, height, width, seed=number),
            options={"crf": "23"},
        )
        path.with_suffix(".txt").write_text(f"the digit {number % 9}")


def request(folder: Path, name: str, pipeline: Mapping[str, int], **changes: object) -> Request:
    file = write_request(folder, output_dir=f"./{name}", **changes)
    values = yaml.safe_load(file.read_text())
    values["pipeline_config"] |= pipeline
    values["models"]["teacher"]["path"] = str(copy_model(folder / "wan"))
    file.write_text(yaml.safe_dump(values))
    return read_request(file)


def copy_model(folder: Path) -> Path:
    """Copy the tiny Wan, with positions for clips of 480p; its transformer is never loaded."""
    if not folder.exists():
        shutil.copytree(TINY / "wan", folder)
        file = folder / "transformer/config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "rope_max_seq_len": 64}))
    return folder


def planned_groups(config: Request) -> list[list[PlannedClip]]:
    items = read_items(config.section.sources, config.section.captions)
    plans = (plan_clips(item, buckets_of(config), cut_of(config)) for item in items)
    return [group for plan in plans for group in group_clips(plan)]


def time_bare_decoder(groups: Sequence[Sequence[PlannedClip]]) -> float:
    """Seconds of CPU time that PyAV takes for all frames up to the last of each video's clips."""
    began = time.process_time()
    for group in groups:
        last = max(number for clip in group for number in clip.numbers)
        with av.open(str(group[0].place.path)) as container:
            container.streams.video[0].thread_count = 1
            for number, _ in enumerate(container.decode(video=0)):
                if number == last:
                    break
    return time.process_time() - began


def time_decoding(config: Request) -> tuple[float, float]:
    """Seconds of the wall and of CPU time that one thread takes from the paths to all clips."""
    began = time.perf_counter(), time.process_time()
    for group in planned_groups(config):
        for clip in decode_clips(group, cut_of(config)):
            list(find_notes(clip.frames))
    return time.perf_counter() - began[0], time.process_time() - began[1]


class Clocks(NamedTuple):
    """Seconds of the wall, of this thread's CPU time, and of all threads'."""

    wall: float
    thread: float
    process: float

    @classmethod
    def now(cls) -> Clocks:
        return cls(time.perf_counter(), time.thread_time(), time.process_time())


@contextlib.contextmanager
def timed_vae(seconds: float | None) -> Iterator[list[tuple[Clocks, Clocks]]]:
    """Within: encoding a clip sleeps, as a thread does that waits for an accelerator; None: it is
    encoded. Yields the clocks when each encoding began and ended."""
    encode, spent = Encoder.encode_clips, []

    def watch(encoder: Encoder, clips: Sequence[MediaClip]) -> torch.Tensor:
        began = Clocks.now()
        if seconds is None:
            latents = encode(encoder, clips)
        else:
            latents = torch.zeros(len(clips), *encoder.adapter.latent_shape)
            time.sleep(seconds)
        spent.append((began, Clocks.now()))
        return latents

    Encoder.encode_clips = watch  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        Encoder.encode_clips = encode  # type: ignore[method-assign]


def measure_throughput(folder: Path, clips: int) -> None:
    write_clips(folder, clips, 130, 720, 1280)
    for pipeline, fps, ratios in (
        ({"num_frames": 9, "height": 32, "width": 32}, 8, (None,)),
        ({"num_frames": 81, "height": 480, "width": 832}, 5, (0.5, 1.0, 2.0)),
    ):
        common = {"batch_size": 1, "items_per_unit": 8, "decode_workers": 1, "clips": {"fps": fps}}
        config = request(folder, "unused", pipeline, **common)
        groups = planned_groups(config)
        bare, (wall, own) = time_bare_decoder(groups), time_decoding(config)
        print(
            f"{pipeline}: ms a clip: PyAV alone {1e3 * bare / clips:.0f} of CPU; decoding alone "
            f"{1e3 * wall / clips:.0f}, of CPU {1e3 * own / clips:.0f}"
        )
        for ratio in ratios:
            sleep = None if ratio is None else ratio * own / clips
            with timed_vae(sleep) as spent:
                name = f"data-{pipeline['height']}-{ratio}"
                run(request(folder, name, pipeline, **common))
            # The first clip is decoded before the first encoding begins.
            total = (spent[-1][0].wall - spent[0][0].wall) * clips / (clips - 1)
            vae = [end.wall - begin.wall for begin, end in spent]
            in_vae = [end.thread - begin.thread for begin, end in spent]
            thread = spent[-1][1].thread - spent[0][0].thread
            decoding = spent[-1][1].process - spent[0][0].process - thread
            slower = max(sum(vae), wall)
            print(
                f"  wall, ms a clip: VAE {1e3 * sum(vae) / clips:.0f}, together "
                f"{1e3 * total / clips:.0f}: {slower / total:.0%} of the slower one's rate\n"
                f"  CPU, ms a clip: VAE {1e3 * sum(in_vae) / clips:.1f}, else in its thread "
                f"{1e3 * (thread - sum(in_vae)) / clips:.1f}, decoding thread about "
                f"{1e3 * decoding / (clips - 1):.0f}",
                flush=True,
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
        folder, "data", {}, batch_size=10, items_per_unit=1, clips={"fps": 8, "take": "windows"}
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
    parser.add_argument("--clips", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        if arguments.clips:
            measure_throughput(Path(name) / "throughput", arguments.clips)
        if arguments.samples:
            measure_memory(Path(name) / "memory", arguments.samples)


if __name__ == "__main__":
    main()
