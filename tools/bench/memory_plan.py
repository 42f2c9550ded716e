"""The memory plan of ``--dry-run`` against what a role really holds, process by process.

    uv run python tools/bench/memory_plan.py [--width 1152] [--layers 9]

A Wan transformer of random weights (200M parameters by default) is loaded as a run loads it, on one
process, two of DDP and two of FSDP2, and is called, differentiated and stepped, with an average.
Then the storages of weights, gradients, moments and average are added up and put beside the plan,
and the growth of the process beside their sum. Last, one call is watched: what it holds for its
backward pass beside the plan of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
import yaml
from attrs import asdict, evolve
from distill_runfile.planning.memory import Planner, averaged_roles
from distill_runfile.read import read_config
from distill_runfile.schema import RunConfig
from distill_trainer import ExponentialMovingAverage, build_optimizers
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("weights", "gradients", "optimizer", "ema")


def measure_role(
    config: RunConfig, role: str, at_the_end: Callable[[], int] = lambda: 0
) -> tuple[dict[str, int], int]:
    """Measure bytes that ``role`` holds on this process after a step, by ``config``'s strategy.

    Returns them by part, and the result of ``at_the_end`` while they are held.
    """
    spec = config.roles[role].spec
    bundle = config.family_plugin.load([spec], config.pipeline, device=torch.device("cpu"))
    handle = bundle[role]
    module = handle.modules["transformer"]
    called = distribute(module, config, role)
    optimizer = config.roles[role].optimizer
    averages: dict[str, Tensor] = {}
    if optimizer is not None:
        build_optimizers(handle, optimizer, horizon=1)
    if role in averaged_roles(config):
        names = handle.trained and handle.trained["transformer"]
        averages = ExponentialMovingAverage(module, 0.9, names=names).weights()
    step(config, handle, called)
    states = [o.state.values() for o in handle.optimizers.values()]
    moments = [v for s in states for entry in s for v in entry.values() if v.ndim]
    found = {
        "weights": storages([*module.parameters(), *module.buffers()]),
        "gradients": storages(p.grad for p in module.parameters() if p.grad is not None),
        "optimizer": storages(moments),
        "ema": storages(averages.values()),
    }
    return found, at_the_end()


def distribute(module: nn.Module, config: RunConfig, role: str) -> nn.Module:
    """Distribute ``module`` by torch's own means; return what is to be called.

    Under ddp each process has all of it, and its gradients are averaged where they are.
    """
    strategy = config.training.distributed.strategy
    if strategy == "fsdp2":
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        planned = Planner().plan(config, config.roles[role].spec).modules[0].tensors
        for block in dict.fromkeys(t.block for t in planned if t.block):
            fully_shard(module.get_submodule(block), mesh=mesh)
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return module


def step(config: RunConfig, role: Any, called: nn.Module) -> None:
    """Run one call, its backward pass and an optimizer step; gradients stay."""
    x_t, t, text = inputs(config, role.name)
    with torch.set_grad_enabled(role.trainable), role.autocast():
        (v,) = called(hidden_states=x_t, timestep=t, encoder_hidden_states=text, return_dict=False)
    if role.trainable:
        v.float().square().mean().backward()
        for optimizer in role.optimizers.values():
            optimizer.step()


def inputs(config: RunConfig, role: str) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, t, text) of one call."""
    rows = config.training.batch_size_per_device or config.training.global_batch_size
    family, spec = config.family_plugin, config.roles[role].spec
    latents = family.latent_shape(config.pipeline, source=config.source)
    text = family.condition_shapes(config.pipeline, source=spec.path)["text"]
    assert latents is not None
    draw = torch.Generator().manual_seed(0)
    return (
        torch.randn((rows, *latents), generator=draw),
        torch.full((rows,), 500.0),
        torch.randn((rows, *text), generator=draw),
    )


def storages(tensors: Iterable[Tensor]) -> int:
    """Count bytes of the memory behind ``tensors`` on this process, each storage once."""
    found = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def plan_bytes(config: RunConfig, role: str, world_size: int, rank: int) -> dict[str, int]:
    """Return the planned bytes of the same."""
    memory = Planner(world_size=world_size).role(config, config.roles[role], rank)
    return asdict(memory.device)


# -- as a program ---------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--layers", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = run_file(Path(folder), args.width, args.layers)
        for strategy, size in (("none", 1), ("ddp", 2), ("fsdp2", 2)):
            multiprocessing.spawn(_process, (size, str(file), strategy), nprocs=size)
        multiprocessing.spawn(_watched, (str(file),), nprocs=1)


def run_file(folder: Path, width: int, layers: int) -> Path:
    """Write a finetuning run on a random transformer beside the tiny pipeline's components."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    tiny = ROOT / "configs" / "tiny" / "wan"
    shutil.copytree(tiny, folder / "wan", ignore=shutil.ignore_patterns("*.safetensors"))
    numbers = json.loads((tiny / "transformer" / "config.json").read_text())
    numbers |= {
        "num_layers": layers, "num_attention_heads": width // 64, "attention_head_dim": 64,
        "ffn_dim": 4 * width,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        WanTransformer3DModel.from_config(numbers).save_pretrained(folder / "wan" / "transformer")
    for part in ("vae", "text_encoder"):
        for file in (tiny / part).glob("*.safetensors"):
            shutil.copy(file, folder / "wan" / part)
    values = yaml.safe_load((ROOT / "configs" / "tiny" / "finetune.yaml").read_text())
    values["models"] = {"student": {"path": str(folder / "wan")}}
    values["data"]["path"] = str(ROOT / "configs" / "tiny" / "data")
    values["training"] |= {
        "output_dir": str(folder / "out"), "max_train_steps": 1, "global_batch_size": 2,
        "batch_size_per_device": 1, "optimizer": {"lr": 0.001},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def with_strategy(config: RunConfig, strategy: str) -> RunConfig:
    """Return the same run with another strategy."""
    distributed = evolve(config.training.distributed, strategy=strategy)
    return evolve(config, training=evolve(config.training, distributed=distributed))


def _process(rank: int, size: int, file: str, strategy: str) -> None:
    torch.set_num_threads(1)
    config = with_strategy(read_config(Path(file)), strategy)
    plan = plan_bytes(config, "student", size, rank)
    if size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
        distributed.init_process_group("gloo", rank=rank, world_size=size)
    before = _rss()
    found, grown = measure_role(config, "student", _rss)
    print(
        f"{strategy} {rank + 1}/{size}: {_compared(plan, found)}; grown by "
        f"{(grown - before) / 1e6:.0f} MB, parts {sum(found.values()) / 1e6:.0f} MB",
        flush=True,
    )
    if size > 1:
        distributed.destroy_process_group()


def _watched(_: int, file: str) -> None:
    from distill_diffusers.planning.calls import measure_call

    torch.set_num_threads(1)
    config = read_config(Path(file))
    spec = config.roles["student"].spec
    bundle = config.family_plugin.load([spec], config.pipeline, device=torch.device("cpu"))
    x_t, _, text = inputs(config, "student")
    values = {"latents": x_t, "t": torch.ones(len(x_t)), "text": text}
    found = measure_call(bundle["student"], config.family_plugin.call_model, values)
    plan = config.family_plugin.plan_call(spec, config.pipeline, source=config.source, batch=1)
    assert plan is not None
    measured = {"held": found.held, "most": found.most}
    print(f"one call of 1 clip: {_compared(asdict(plan), measured)}")


def _compared(plan: Mapping[str, int], found: Mapping[str, int]) -> str:
    return ", ".join(
        f"{part} {plan[part] / 1e6:.1f} MB planned {found[part] / 1e6:.1f} measured "
        f"({plan[part] / found[part] - 1:+.2%})"
        for part in found
    )


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
