"""What loading costs in memory: streamed against naive loads, and three roles on one base.

    uv run python tools/bench/loading.py [--layers 4] [--rounds 3]

A Wan as wide as the 1.3B one (four layers: 211M parameters, 0.84 GB in fp32) with random weights is
written to a temporary folder. Each load runs in one or two new processes, over gloo:

- state dict: the naive one: build, ``load_file``, ``load_state_dict``;
- whole, 256 MiB: this package's load as a role that each process holds, by two sizes of groups;
- sharded: the same under FSDP2;
- three LoRA: student and critic with adapters of rank 32 beside a teacher's weights.

diffusers refuses ``from_pretrained(low_cpu_mem_usage=False)`` for this model; its default gives the
mapped file itself, which is read when it is first called and must be copied before it is trained.

Counted is what a load adds to its process once everything is imported: the peak of its resident
memory (VmHWM), which includes pages of mapped files, and the peak of its anonymous memory, which is
its own. What Python and the libraries take is shown once. Ratios are of the loads of one round,
which run one after another; shown are median, least and most of the rounds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
from pathlib import Path
from typing import Any

from export import Anonymous, build_folders, status

RANK = 32
CONTEXT = multiprocessing.get_context("forkserver")
CASES = [
    "state dict",
    "whole",
    "whole, 256 MiB",
    "sharded",
    "one frozen",
    "three LoRA",
    "three LoRA, sharded",
]
RATIOS = [
    ("whole", "state dict"),
    ("whole, 256 MiB", "state dict"),
    ("sharded", "state dict"),
    ("three LoRA", "one frozen"),
    ("three LoRA, sharded", "sharded"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    CONTEXT.set_forkserver_preload(["distill_diffusers.roles.loading", "torch._dynamo", "export"])
    with tempfile.TemporaryDirectory() as name:
        facts = build_folders(Path(name), given.layers)
        print(f"{facts['parameters'] / 1e6:.0f}M parameters, {facts['bytes'] / 1e9:.2f} GB in fp32")
        for size in (1, 2):
            rounds = [
                {case: run_processes(Path(name), case, size) for case in CASES}
                for _ in range(given.rounds)
            ]
            report(rounds, size, facts["bytes"])


def run_processes(folder: Path, case: str, size: int) -> list[dict[str, float]]:
    """Load on each rank, in processes forked from one that has imported everything."""
    store = folder / "store"
    store.unlink(missing_ok=True)
    started = []
    for rank in range(size):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        child = CONTEXT.Process(target=process, args=(theirs, folder, case, rank, size))
        child.start()
        theirs.close()
        started.append((ours, child))
    numbers = [pipe.recv() for pipe, _ in started]
    for _, child in started:
        child.join()
    return numbers


def process(pipe: Any, folder: Path, case: str, rank: int, size: int) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", store, rank=rank, world_size=size)
    pipe.send(measure(folder, case, size))
    distributed.barrier()


def report(rounds: list[dict[str, list[dict[str, float]]]], size: int, whole: int) -> None:
    print(
        f"\n{size} process{'es' * (size > 1)}; in role sizes, by rank: resident (anonymous), time"
    )
    for case in CASES:
        ranks = [[found[case][rank] for found in rounds] for rank in range(size)]
        shown = "   ".join(
            f"{_median(r, 'resident') / whole:.2f} ({_median(r, 'anonymous') / whole:.2f}) "
            f"{_median(r, 'seconds'):.1f} s"
            for r in ranks
        )
        print(f"  {case:<22} {shown}")
    before = _median([f for found in rounds for case in CASES for f in found[case]], "before")
    print(f"  before any load: {before / 1e6:.0f} MB")
    for ours, theirs in RATIOS:
        for rank in range(size):
            shown = "   ".join(
                f"{key} {_spread([f[ours][rank][key] / f[theirs][rank][key] for f in rounds])}"
                for key in ("resident", "anonymous")
            )
            print(f"  rank {rank}: {ours} / {theirs}: {shown}")


def _median(found: list[dict[str, float]], key: str) -> float:
    return statistics.median(each[key] for each in found)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def measure(folder: Path, case: str, size: int) -> dict[str, float]:
    """Load in this process; return seconds, and bytes above those before it."""
    import time

    import torch
    from distill_adapters_wan import PLUGIN, WAN, WanPipelineConfig
    from distill_diffusers.architecture import transformer_class
    from distill_diffusers.weights import filling
    from distill_protocols import LoraSpec, RoleHandle, RoleSpec
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (size,))
    cpu, base = torch.device("cpu"), str(folder / "base")

    def shard(role: RoleHandle) -> None:
        (module,) = role.modules.values()
        for block in role.blocks["transformer"]:
            fully_shard(module.get_submodule(block), mesh=mesh)
        fully_shard(module, mesh=mesh)

    def ours() -> object:
        teacher = RoleSpec(name="teacher", path=base, trainable=False)
        roles = [RoleSpec(name="student", path=base, trainable=True)]
        if case == "one frozen":
            roles = [teacher]
        elif case.startswith("three"):
            guests = [
                RoleSpec(
                    name=name, path=base, trainable=True, base="teacher", lora=LoraSpec(rank=RANK)
                )
                for name in ("student", "critic")
            ]
            roles = [teacher, *guests]
        config = WanPipelineConfig(num_frames=9, height=32, width=32, max_sequence_length=8)
        way = {"shard": shard} if case.endswith("sharded") else {}
        return PLUGIN.load(roles, config, device=cpu, **way)

    def naive() -> object:
        model_class = transformer_class(WAN)
        path = folder / "base" / "transformer"
        from safetensors.torch import load_file

        module = model_class.from_config(model_class.load_config(path))
        module.load_state_dict(load_file(path / "diffusion_pytorch_model.safetensors"))
        return module

    if "256" in case:
        filling.GROUP_BYTES = 256 * 1024**2
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, anonymous = status("VmRSS"), Anonymous()
    start = time.perf_counter()
    with anonymous:
        kept = (naive if case == "state dict" else ours)()
    seconds = time.perf_counter() - start
    resident = status("VmHWM") - before
    distributed.barrier()
    del kept
    return {
        "seconds": seconds,
        "resident": resident,
        "anonymous": anonymous.added,
        "before": before,
    }


if __name__ == "__main__":
    main()
