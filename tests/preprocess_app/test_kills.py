"""Random SIGKILLs of real processes: nothing is lost, doubled or torn."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from media_files import moving_frames, write_video
from preprocess_requests import work_on, write_request

CLIPS, KILLS = 60, 25


CONTEXT = multiprocessing.get_context("forkserver")
"""Each process is forked from one that has imported everything, so that a kill costs no start."""


def start(folder: Path, world: int) -> list[BaseProcess]:
    processes = [
        CONTEXT.Process(target=work_on, args=(folder, rank, world)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def wait(processes: list[BaseProcess], folder: Path) -> None:
    for process in processes:
        process.join(timeout=600)
        assert process.exitcode == 0, (folder / "log.txt").read_text()[-3000:]


def state(folder: Path) -> tuple[int, int]:
    """Units and shards, parts of them included, that are there."""
    if not folder.exists():
        return 0, 0
    names = os.listdir(folder)
    return sum(name.startswith("unit-") for name in names), len(names)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_25_kills_end_like_an_uninterrupted_run(tmp_path, world):
    CONTEXT.set_forkserver_preload(["distill_preprocess.run", "distill_adapters_wan.adapter"])
    clips = tmp_path / "clips"
    for number in range(CLIPS):
        path = write_video(clips / f"{number:03d}.mp4", moving_frames(12, 48, 48, seed=number))
        path.with_suffix(".txt").write_text(f"the digit {number % 7}")
        if number % 10 == 3:
            path.write_bytes(path.read_bytes()[:500])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        (folder / "clips").symlink_to(clips)
        write_request(folder, items_per_unit=1, batch_size=1)
    wait(start(whole, world), whole)
    generator = random.Random(world)
    units = 0
    for kill in range(KILLS):
        # Each round gets some units further, and ends at a random moment of the next one.
        goal = units + generator.randint(0, 2)
        processes = start(killed, world)
        before = state(killed / "data")
        while state(killed / "data")[0] < goal or state(killed / "data") == before:
            if not any(process.is_alive() for process in processes):
                break
            time.sleep(0.001)
        time.sleep(generator.random() * 0.08)
        for process in processes:
            process.kill()
        for process in processes:
            process.join(timeout=60)
        units = state(killed / "data")[0]
        print(f"kill {kill + 1}: {units} units are there")
    assert units < CLIPS  # the last kill came before the end too
    wait(start(killed, world), killed)
    assert contents(killed / "data") == contents(whole / "data")
