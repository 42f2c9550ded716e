"""The checks, by name, each of which returns rows."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from distill_protocols import RowGenerators, SamplerSpec, StepRecord
from distill_runfile import read_config
from distill_runfile.planning.memory import Planner
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils import clip_grad_norm_

from gpu_check.runs import (
    Size,
    Watch,
    built,
    prepare,
    run_values,
    synchronize,
    train_watched,
    write_run,
)

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16, by a part of the device's name."""
SETTLED = 4
"""The first iteration that is measured: before it memory is taken and kernels are chosen."""
WRITES = 20e9
"""Bytes a second at which a checkpoint must at least leave the device."""


@frozen
class Row:
    """One figure.

    Attributes:
        good: whether it is what it should be; None: this device cannot tell.
    """

    check: str
    measured: str
    aim: str
    good: bool | None = None

    @property
    def verdict(self) -> str:
        return {True: "yes", False: "NO", None: ""}[self.good]

    def line(self) -> str:
        return f"{self.verdict:3} {self.check}: {self.measured} (aim: {self.aim})"

    def table_row(self) -> str:
        return f"| {self.check} | {self.measured} | {self.aim} | {self.verdict} |"


def on_device(good: bool) -> bool | None:
    """Return a verdict that a CPU cannot give."""
    return good if torch.cuda.is_available() else None


def check_attention(_: Path, size: Size) -> list[Row]:
    """Forward and backward of one layer's attention, by each kernel that torch has here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    heads, width = size.transformer.get("num_attention_heads", 4), 128 if size.transformer else 32
    q, k, v = (
        torch.randn(
            1, heads, size.tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True
        )
        for _ in range(3)
    )

    def call() -> None:
        scaled_dot_product_attention(q, k, v).sum().backward()

    kinds = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    found = {"default": time_call(call)}
    for kind in kinds:
        try:
            with sdpa_kernel(kind):
                found[kind.name.lower()] = time_call(call)
        except RuntimeError:  # not on this device, or not for this shape
            continue
    best = min(found, key=lambda name: found[name])
    ratio = found[best] / found["default"]
    measured = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in found.items())
    return [
        Row(
            "attention, forward and backward",
            measured,
            "default at least .9 x the best",
            on_device(ratio >= 0.9),
        )
    ]


def check_syncs(folder: Path, size: Size) -> list[Row]:
    """No iteration between log points waits for the device; torch raises where one does."""

    def mode(value: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode(value)

    def begin(iteration: int) -> None:
        mode("error" if SETTLED <= iteration < size.steps else "default")

    file = write_run(folder, "syncs", run_values(folder, size))
    try:
        train_watched(file, begin, lambda _: mode("default"))
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return [Row("host waits in a step", str(error).splitlines()[0], "none", good=False)]
    return [Row("host waits in a step", "none", "none", on_device(good=True))]


def check_speed(folder: Path, size: Size) -> list[Row]:
    """Two critic iterations and one of both roles: the trainer beside a bare loop."""
    file = write_run(folder, "speed", run_values(folder, size))
    times: dict[int, float] = {}
    begin, end = clock(times)
    with built(file) as (_, run):
        run.trainer.callbacks["gpu_check"] = Watch(begin, end)
        run.trainer.run(run.method, run.loader)
        in_trainer = sum(times[i] for i in range(SETTLED, size.steps + 1))
        batches = iter(run.loader)
        bare = 0.0
        for iteration in range(1, size.steps + 1):
            synchronize()
            start = time.perf_counter()
            bare_iteration(run.method, next(batches), iteration)
            synchronize()
            if iteration >= SETTLED:
                bare += time.perf_counter() - start
        flops = count_flops(lambda: bare_iteration(run.method, next(batches), size.steps))
        synchronize()
        start = time.perf_counter()
        bare_iteration(run.method, next(batches), size.steps)
        synchronize()
        rate = flops / (time.perf_counter() - start)
    ratio = in_trainer / bare
    rows = [
        Row(
            "trainer over a bare loop",
            f"{ratio:.3f} ({in_trainer:.2f} s against {bare:.2f} s, {size.steps - SETTLED + 1} "
            "iterations)",
            "at most 1.02",
            on_device(ratio <= 1.02),
        )
    ]
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = next((value for part, value in PEAK_FLOPS.items() if part in name), None)
    share = "" if peak is None else f", {rate / peak:.0%} of the device's bf16 peak"
    measured = f"{flops / 1e12:.4g} TFLOP, {rate / 1e12:.4g} TFLOP/s{share}"
    return [*rows, Row("an iteration of student and critic", measured, "reported")]


def check_memory(folder: Path, size: Size) -> list[Row]:
    """The allocator's peak of each kind of iteration beside the plan of ``--dry-run``."""
    file = write_run(folder, "memory", run_values(folder, size))
    plans = {turn.roles: turn.total for turn in Planner(world_size=1).run(read_config(file)).turns}
    peaks: dict[int, int] = {}

    def begin(_: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def end(step: StepRecord) -> None:
        peaks[step.iteration] = (
            torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        )

    train_watched(file, begin, end)
    rows = []
    for roles, planned in plans.items():
        peak = max(
            peaks[i] for i in range(SETTLED, size.steps + 1) if (i % 3 == 0) == ("student" in roles)
        )
        measured = f"{peak / 1e9:.2f} GB, planned {planned / 1e9:.2f} GB" if peak else (
            f"planned {planned / 1e9:.4f} GB"
        )  # fmt: skip
        good = on_device(abs(planned / peak - 1) <= 0.1) if peak else None
        rows.append(Row(f"peak memory, {' and '.join(roles)}", measured, "within 10 %", good))
    return rows


def check_compile(folder: Path, size: Size) -> list[Row]:
    """Compiled blocks: graphs, recompilation, time and losses against eager."""
    from torch._dynamo.utils import counters

    seconds, losses, graphs = {}, {}, {}
    for name in ("eager", "compiled"):
        values = run_values(folder, size)
        if name == "compiled":
            for role in values["models"].values():
                role["compile"] = {}
        times: dict[int, float] = {}
        begin, end = clock(times)
        found: list[float] = []
        compiled: dict[int, int] = {}

        def note(
            step: StepRecord,
            end: Callable[[StepRecord], None] = end,
            found: list[float] = found,
            compiled: dict[int, int] = compiled,
        ) -> None:
            end(step)
            found += [float(value) for value in step.losses.values()]
            compiled[step.iteration] = counters["stats"]["unique_graphs"]

        train_watched(write_run(folder, name, values), begin, note)
        seconds[name] = sum(times[i] for i in range(SETTLED, size.steps + 1))
        losses[name], graphs[name] = found, compiled
    late = graphs["compiled"][size.steps] - graphs["compiled"][SETTLED - 1]
    count = graphs["compiled"][size.steps]
    apart = max(
        abs(one / other - 1) for one, other in zip(losses["compiled"], losses["eager"], strict=True)
    )
    ratio = seconds["compiled"] / seconds["eager"]
    return [
        Row("graphs of compiled blocks", str(count), "fewer than 8", good=count < 8),
        Row(f"graphs after iteration {SETTLED - 1}", str(late), "0", good=late == 0),
        Row("compiled over eager, time", f"{ratio:.2f}", "at most .9", on_device(ratio <= 0.9)),
        Row("compiled against eager, losses", f"{apart:.2g} apart", "5 %", good=apart <= 0.05),
    ]


def check_rollout(folder: Path, size: Size) -> list[Row]:
    """A causal student's rollout: time a chunk, and how much of it is kernels."""
    values = run_values(folder, size, "self_forcing")
    values["pipeline_config"]["causal"] |= {"chunk_frames": 1, "window_frames": 1}
    if size.transformer:
        values["pipeline_config"]["causal"] |= {"chunk_frames": 3, "window_frames": 9}
    with built(write_run(folder, "rollout", values)) as (_, run):
        chunks = run.adapter.causal.chunks("student", None) if run.adapter.causal else ()
        spec = SamplerSpec(steps=4, shift=5.0, stochastic=True)
        batch = next(iter(run.loader))
        noise = torch.randn(1, *size.shape, device=batch.device)
        calls: list[float] = []

        def note() -> None:
            synchronize()
            calls.append(time.perf_counter())

        def roll(poll: Callable[[], None]) -> None:
            with torch.no_grad():
                run.adapter.rollout(
                    "student", spec, noise, batch.cond,
                    exit_steps=(3,) * len(chunks),
                    generators=RowGenerators.seeded(0, "fresh", [0]), poll=poll,
                )  # fmt: skip

        roll(lambda: None)
        roll(note)
        share = share_of_kernels(lambda: roll(lambda: None))
    each = (len(calls) - 1) / len(chunks)
    ends = [calls[min(len(calls) - 1, round(each * (n + 1)))] for n in range(len(chunks))]
    times = [b - a for a, b in zip([calls[0], *ends], ends, strict=False)]
    whole = times[:-1] or times  # the last chunk is not stored, so it has a call less
    inside = whole[len(whole) // 2 :]
    growth = inside[-1] / inside[0]
    measured = ", ".join(f"{1e3 * seconds:.0f}" for seconds in times)
    shown = "not measured" if share is None else f"{share:.0%}"
    return [
        Row("causal rollout, ms by chunk", measured, "reported"),
        Row(
            "its last full chunk over one half-way",
            f"{growth:.2f}",
            "at most 1.1, as the window is full",
            on_device(growth <= 1.1),
        ),
        Row(
            "its kernels over wall time",
            shown,
            "at least 80 %",
            None if share is None else share >= 0.8,
        ),
    ]


def check_checkpoint(folder: Path, size: Size) -> list[Row]:
    """An asynchronous save in the middle: how long the loop stands, and whether a resume is exact.

    With 6 layers, as the state of the whole model three times over fills a disk.
    """
    small = evolve(size, transformer=size.transformer | {"num_layers": 6})
    place = folder / "few-layers"
    if not place.exists():
        place.mkdir()
        prepare(place, small)
    values = run_values(place, small)
    values["checkpoint"] = {"every_steps": 3, "async_save": True, "resume": "latest"}
    ends: dict[int, float] = {}
    begins: dict[int, float] = {}
    file = write_run(place, "saved", values)
    train_watched(
        file,
        lambda i: begins.__setitem__(i, time.perf_counter()),
        lambda step: ends.__setitem__(step.iteration, time.perf_counter()),
    )
    output = place / "out-saved"
    first, last = (output / f"checkpoint-{n:06d}" for n in (3, size.steps))
    total = sum(f.stat().st_size for f in first.rglob("*.safetensors"))
    stall, allowed = begins[4] - ends[3], total / WRITES + 1
    rows = [
        Row(
            "asynchronous save, the loop stands",
            f"{stall:.2f} s for {total / 1e9:.2f} GB",
            f"at most {allowed:.2f} s",
            on_device(stall <= allowed),
        )
    ]
    if torch.cuda.is_available():
        pinned = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)
        rows.append(
            Row(
                "its pinned memory",
                f"{pinned / total:.2f} x the checkpoint",
                "at most 1.2 x",
                good=pinned <= 1.2 * total,
            )
        )
    values = json.loads(json.dumps(values))
    again = write_run(place, "resumed", values)
    (place / "out-resumed").mkdir()
    shutil.copytree(first, place / "out-resumed" / first.name)
    train_watched(again)
    apart = list(differences(last, place / "out-resumed" / last.name))
    measured = "equal to the bit" if not apart else f"{len(apart)} files differ ({apart[0]} first)"
    return [*rows, Row("resumed run", measured, "equal to the bit", good=not apart)]


def check_fsdp(folder: Path, size: Size) -> list[Row]:
    """FSDP2 of one process against no distribution."""
    losses: dict[str, list[float]] = {}
    for strategy in ("none", "fsdp2"):
        values = run_values(folder, size)
        values["training"]["distributed"] = {"strategy": strategy}
        found: list[float] = []
        train_watched(
            write_run(folder, strategy, values),
            end=lambda step, found=found: found.extend(map(float, step.losses.values())),
        )
        losses[strategy] = found
    apart = max(abs(a / b - 1) for a, b in zip(losses["fsdp2"], losses["none"], strict=True))
    return [Row("fsdp2 on one process, losses", f"{apart:.2g} apart", "2 %", good=apart <= 0.02)]


def check_derivatives(folder: Path, size: Size) -> list[Row]:
    """The derivative of continuous consistency by JVP and by difference, and the VAE's decoder, on
    clips of at most 9 latent frames."""
    short = size
    if size.shape[1] > 9:
        channels, _, height, width = size.shape
        short = evolve(size, num_frames=33, shape=(channels, 9, height, width))
    place = folder / "short"
    if not place.exists():
        place.mkdir()
        prepare(place, short)
    rows, losses = [], {}
    for derivative in ("jvp", "finite_difference"):
        values = run_values(place, short, "consistency")
        del values["models"]["critic"]
        values["models"]["student"]["precision"] = "fp32"
        values["method_config"] = {"continuous": {"derivative": derivative}}
        times: dict[int, float] = {}
        begin, end = clock(times)
        found: list[float] = []

        def note(
            step: StepRecord,
            end: Callable[[StepRecord], None] = end,
            found: list[float] = found,
        ) -> None:
            end(step)
            found += [float(value) for value in step.losses.values()]

        train_watched(write_run(place, derivative, values), begin, note)
        seconds = statistics.median(times[i] for i in range(SETTLED, short.steps + 1))
        losses[derivative] = found
        rows.append(Row(f"continuous consistency, {derivative}", f"{seconds:.2f} s", "reported"))
    pairs = zip(losses["jvp"], losses["finite_difference"], strict=True)
    apart = max(abs(a / b - 1) for a, b in pairs)
    rows.append(
        Row("their losses", f"{apart:.2g} apart", "reported; the loss is near .5 whatever it is")
    )
    with built(write_run(folder, "decode", run_values(folder, size))) as (_, run):
        latents = torch.randn(1, *size.shape)[:, :, :9].to(run.method.context.device)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        seconds = time_call(lambda: run.adapter.decode(latents), repeats=2)
        peak = torch.cuda.max_memory_allocated() - before if torch.cuda.is_available() else 0
    measured = f"{seconds:.2f} s" + (f", {peak / 1e9:.2f} GB" if peak else "")
    return [*rows, Row(f"decoding {latents.shape[2]} latent frames", measured, "reported")]


CHECKS: Mapping[str, Callable[[Path, Size], list[Row]]] = {
    "attention": check_attention,
    "syncs": check_syncs,
    "speed": check_speed,
    "memory": check_memory,
    "compile": check_compile,
    "rollout": check_rollout,
    "checkpoint": check_checkpoint,
    "fsdp": check_fsdp,
    "derivatives": check_derivatives,
}


# -- measuring ------------------------------------------------------------------------------------


def clock(times: dict[int, float]) -> tuple[Callable[[int], None], Callable[[StepRecord], None]]:
    """Return what begins and ends the time of an iteration, which goes to ``times``."""
    started: dict[int, float] = {}

    def begin(iteration: int) -> None:
        synchronize()
        started[iteration] = time.perf_counter()

    def end(step: StepRecord) -> None:
        synchronize()
        times[step.iteration] = time.perf_counter() - started[step.iteration]

    return begin, end


def time_call(call: Callable[[], object], repeats: int = 5) -> float:
    """Return the median seconds of a call, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def bare_iteration(method: Any, batch: Any, iteration: int) -> None:
    """Do what the trainer does for the maths of an iteration, and nothing else."""
    method.single_train_step(batch, iteration).loss_map["total_loss"].backward()
    for name in method.get_optimizers(iteration):
        clip_grad_norm_(method.model_dict[name].parameters(), 1.0)
    method.optimizers_schedulers_step(iteration)
    method.optimizers_zero_grad(iteration)


def count_flops(call: Callable[[], object]) -> float:
    """Count what a call computes, recomputed activations included."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def share_of_kernels(call: Callable[[], object]) -> float | None:
    """Return the time of kernels over the wall time of ``call``; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        wall = time.perf_counter() - start
    busy = sum(event.self_device_time_total for event in profiler.key_averages())
    return busy / 1e6 / wall


def differences(one: Path, other: Path) -> Iterator[str]:
    """Name the files of weights and state that are not the same bytes in both folders."""
    names = sorted(f.relative_to(one) for f in one.rglob("*.safetensors"))
    for name in names:
        if (one / name).read_bytes() != (other / name).read_bytes():
            yield str(name)
