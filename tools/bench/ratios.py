"""The ratios of ``tools/bench``, by name. Times are of CPU, so that others on the machine count
little; of files they are of the wall."""

from __future__ import annotations

import itertools
import logging
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import Any

import torch
from attrs import evolve
from distill_checkpoint import CheckpointConfig, CheckpointManager
from distill_protocols import Condition, DistillAdapter
from distill_train.build import Run
from gpu_check.checks import bare_iteration
from gpu_check.runs import TINY, built, prepare, run_values, write_run
from torch import Tensor

from bench import checkpoint, loader, preprocess
from bench.figures import Figure, time_in_turns

APP = Path(__file__).resolve().parents[2] / "apps" / "train"
LAYERS = (2, 4, 8)
ITERATIONS = 10
"""Of a run that are timed as one: five with the student's update and more without."""


def measure_trainer(folder: Path, repeats: int) -> Iterator[Figure]:
    """The trainer over a loop that makes the same calls and nothing else, for three methods and
    three sizes of model."""
    for layers, method in itertools.product(LAYERS, ("finetune", "dmd2", "self_forcing")):
        place = folder / f"{layers}"
        if not place.exists():
            place.mkdir()
            prepare(place, evolve(TINY, transformer={"num_layers": layers}))
        ratios = race(place, method, repeats)
        yield Figure.of(f"trainer over bare loop, {method}, {layers} layers", ratios)


def race(folder: Path, method: str, repeats: int) -> list[float]:
    """Return CPU seconds of trainer over bare loop, of ``ITERATIONS`` each, iteration by iteration
    in turns: two runs of one file, each in a thread, of which one works at a time. They must end
    with equal weights, or the comparison means nothing."""
    steps = ITERATIONS * (repeats + 2)
    values = run_values(folder, TINY, method)
    if method == "finetune":
        for role in ("teacher", "critic"):
            del values["models"][role]
        values["method_config"] = {"student_sampler": {"steps": 4, "guidance": 1.0}}
    for role in values["models"].values():
        role.pop("activation_checkpointing", None)
        role["precision"] = "fp32"
    values["training"] |= {"max_train_steps": steps, "log_every": ITERATIONS, "trackers": ["jsonl"]}
    files = [write_run(folder, f"{method}-{side}", values) for side in ("trainer", "bare")]
    turns = Turns(steps)
    with built(files[0]) as (_, ours), built(files[1]) as (_, bare):

        def train() -> None:
            ours.trainer.run(ours.method, turns.batches(iter(ours.loader), 0))

        def loop() -> None:
            for iteration, batch in enumerate(turns.batches(iter(bare.loader), 1), start=1):
                bare_iteration(bare.method, batch, iteration)

        threads = [threading.Thread(target=turns.ending(run, side)) for side, run in
                   enumerate((train, loop))]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name, module in ours.method.model_dict.items():
            other = bare.method.model_dict[name].state_dict()
            if not all(
                torch.equal(value, other[key]) for key, value in module.state_dict().items()
            ):
                raise SystemExit(f"{name} ended with other weights: this is not the same maths")
    sums = [
        [sum(of[first : first + ITERATIONS]) for first in range(ITERATIONS, steps, ITERATIONS)]
        for of in turns.seconds
    ]
    # The last iteration of a side is seen by nobody, and its ten are left out.
    pairs = list(zip(*sums, strict=False))[:-1]
    return [ours / bare for ours, bare in pairs]


class Turns:
    """Lets two loops work iteration by iteration in turns, and times each iteration."""

    def __init__(self, steps: int) -> None:
        self.seconds: tuple[list[float], list[float]] = ([], [])
        self._steps = steps
        self._go = (threading.Semaphore(1), threading.Semaphore(0))

    def batches(self, data: Iterator[Any], side: int) -> Iterator[Any]:
        """Yield batches; asking for one ends the turn of ``side``."""
        for _ in range(self._steps):
            self._go[side].acquire()
            began = time.process_time()
            yield next(data)
            self.seconds[side].append(time.process_time() - began)
            self._go[1 - side].release()

    def ending(self, run: Callable[[], None], side: int) -> Callable[[], None]:
        """Return ``run``, after which the other side waits no more."""

        def whole() -> None:
            try:
                run()
            finally:
                self._go[1 - side].release(self._steps)

        return whole


def measure_guidance(folder: Path, repeats: int) -> Iterator[Figure]:
    """A guided call of 2B over two calls of B."""
    prepare(folder, TINY)
    calls = {}
    for batched in (True, False):
        values = run_values(folder, TINY)
        values["pipeline_config"]["cfg_batched"] = batched
        with built(write_run(folder, f"guided-{batched}", values)) as (_, run):
            calls[batched] = partial(call_guided, run.adapter, *inputs_of(run))
    yield time_in_turns(
        "guidance in one call over two", calls[True], calls[False], time.process_time, repeats
    )


def inputs_of(run: Run) -> tuple[Tensor, Tensor, Condition]:
    """Return (x_t, t, condition) of one clip."""
    batch = next(iter(run.loader))
    return torch.randn(1, *TINY.shape), torch.full((1,), 500.0), batch.cond


def call_guided(adapter: DistillAdapter, x_t: Tensor, t: Tensor, cond: Condition) -> None:
    """Call the teacher with guidance."""
    with torch.no_grad():
        for _ in range(20):
            adapter.forward("teacher", x_t, t, cond, neg_cond=cond, cfg=3.0)


def call_with_gradient(adapter: DistillAdapter, x_t: Tensor, t: Tensor, cond: Condition) -> None:
    """Call the student and differentiate."""
    for _ in range(10):
        adapter.forward("student", x_t, t, cond).square().mean().backward()


def measure_blocks(folder: Path, repeats: int) -> Iterator[Figure]:
    """Compiled and checkpointed blocks over plain ones: a call of the student and its backward."""
    prepare(folder, TINY)
    kinds = {"plain": {}, "compiled": {"compile": {}}, "checkpointed": {}}
    calls = {}
    for kind, options in kinds.items():
        values = run_values(folder, TINY)
        student = {"path": str(folder / "wan"), **options}
        student["activation_checkpointing"] = kind == "checkpointed"
        values["models"]["student"] = student
        with built(write_run(folder, kind, values)) as (_, run):
            calls[kind] = partial(call_with_gradient, run.adapter, *inputs_of(run))
    for kind in ("compiled", "checkpointed"):
        yield time_in_turns(
            f"{kind} blocks over plain ones, forward and backward",
            calls[kind],
            calls["plain"],
            time.process_time,
            repeats,
        )


def measure_data(folder: Path, repeats: int) -> Iterator[Figure]:
    """The share of an iteration that waits for its data, and clips a second of preprocessing."""
    for method in ("finetune", "dmd2"):
        shares = [
            loader.wait_share(folder / str(number), method, 12, workers=0)[0]
            for number in range(3)
            if (folder / str(number)).mkdir() is None
        ]
        yield Figure.of(f"waiting for data over an iteration, {method}", shares)
        for number in range(3):
            shutil.rmtree(folder / str(number))
    place = folder / "clips"
    preprocess.write_clips(place, 8, 130, 720, 1280)
    common = {"batch_size": 1, "items_per_unit": 8, "decode_workers": 1, "clips": {"fps": 8}}
    size = {"num_frames": 9, "height": 32, "width": 32}
    ratios = []
    for number in range(min(repeats, 4)):
        config = preprocess.request(place, f"data-{number}", size, **common)
        wall, _ = preprocess.time_decoding(config)
        with preprocess.timed_vae(None) as spent:
            preprocess.run(config)
        total = (spent[-1][0].wall - spent[0][0].wall) * 8 / 7
        ratios.append(total / max(wall, sum(end.wall - begin.wall for begin, end in spent)))
    yield Figure.of("preprocessing over the slower of decoding and VAE", ratios)


def measure_checkpoints(folder: Path, repeats: int) -> Iterator[Figure]:
    """A checkpoint over the same bytes by safetensors alone, written and read."""
    logging.disable(logging.INFO)
    run = checkpoint.train(folder / "train", 10_000_000, 2, None)
    tensors = checkpoint.tensors_of(run)
    raw, ours = folder / "raw", folder / "ours"
    manager = CheckpointManager(CheckpointConfig(), ours, {})

    def write_ours() -> None:
        shutil.rmtree(ours, ignore_errors=True)
        manager.save(run, {})

    def write_raw() -> None:
        shutil.rmtree(raw, ignore_errors=True)
        checkpoint.write_raw(raw, tensors, fsync=True)

    yield time_in_turns("saving over raw safetensors", write_ours, write_raw,
                        time.perf_counter, repeats)  # fmt: skip
    again = CheckpointManager(CheckpointConfig(resume="latest"), ours, {})
    yield time_in_turns(
        "loading, verified, over raw safetensors",
        lambda: again.resume(run, {}),
        lambda: checkpoint.read_raw(raw, tensors),
        time.perf_counter,
        repeats,
    )


def measure_start(folder: Path, repeats: int) -> Iterator[Figure]:
    """CPU seconds of a whole run of one iteration, and to a wrong file's problems, over ``import
    torch``."""
    prepare(folder, TINY)
    values = run_values(folder, TINY)
    values["training"]["max_train_steps"] = 1
    values["method_config"]["generator_update_interval"] = 1
    file = write_run(folder, "start", values)
    wrong = folder / "wrong.yaml"
    wrong.write_text(file.read_text().replace("global_batch_size", "global_batch_sise"))

    def app(config: Path, status: int) -> None:
        shutil.rmtree(folder / "out-start", ignore_errors=True)
        run_quietly([str(APP), "--config", str(config)], status)

    def clock() -> float:
        used = getrusage(RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    for name, config, status in (
        ("a run of one iteration", file, 0),
        ("a wrong run file", wrong, 2),
    ):
        yield time_in_turns(
            f"{name} over import torch",
            lambda config=config, status=status: app(config, status),
            lambda: run_quietly(["-c", "import torch"]),
            clock,
            min(repeats, 5),
        )


def run_quietly(arguments: list[str], status: int = 0) -> None:
    """Run Python in a process of its own, which ends with ``status``."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode != status:
        raise SystemExit(f"{arguments} ended with {done.returncode}: {done.stderr[-2000:]}")


RATIOS: Mapping[str, Callable[[Path, int], Iterator[Figure]]] = {
    "trainer": measure_trainer,
    "guidance": measure_guidance,
    "blocks": measure_blocks,
    "data": measure_data,
    "checkpoints": measure_checkpoints,
    "start": measure_start,
}
