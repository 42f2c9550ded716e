"""What several processes do with a Wan (see ``ranks``): load, call, train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from attrs import frozen
from distill_adapters_wan import PLUGIN, WanPipelineConfig
from distill_adapters_wan.adapter import WanAdapter
from distill_diffusers.lora import base_name, is_adapter
from distill_protocols import (
    Condition,
    DistillError,
    LoraSpec,
    ModelBundle,
    RoleHandle,
    RoleSpec,
    WeightSource,
)
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

CONFIG = WanPipelineConfig(num_frames=5, height=32, width=48, max_sequence_length=6)
CPU = torch.device("cpu")
Shard = Callable[[RoleHandle], None]


def no_sharding(role: RoleHandle) -> None:
    """Shard nothing: every process holds all of the module."""


def shard(role: RoleHandle, *shape: int, **options: Any) -> None:
    """FSDP2 over a mesh of ``shape`` (HSDP if it has two dimensions); all processes left out."""
    shape = shape or (distributed.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts")[-len(shape) :])
    for key, module in role.modules.items():
        for block in role.blocks[key]:
            fully_shard(module.get_submodule(block), mesh=mesh, **options)
        fully_shard(module, mesh=mesh, **options)


def shard_on_cpu(role: RoleHandle) -> None:
    shard(role, offload_policy=CPUOffloadPolicy(pin_memory=False))


def hsdp_copies(role: RoleHandle) -> None:
    shard(role, distributed.get_world_size(), 1)


def hsdp_parts(role: RoleHandle) -> None:
    shard(role, 1, distributed.get_world_size())


def spec(folder: Path | str, name: str = "teacher", **kwargs: Any) -> RoleSpec:
    return RoleSpec(**{"name": name, "path": str(folder), "trainable": False, **kwargs})


def trio(folder: Path | str, **kwargs: Any) -> list[RoleSpec]:
    """Student and critic beside the weights of a teacher; not in the order of loading."""
    lora = LoraSpec(rank=3, alpha=6.0)
    guests = [
        spec(folder, name, trainable=True, lora=lora, base="teacher", **kwargs)
        for name in ("student", "critic")
    ]
    return [guests[0], spec(folder, **kwargs), guests[1]]


def load(
    roles: Iterable[RoleSpec],
    how: Shard = no_sharding,
    weights: Mapping[str, Mapping[str, WeightSource]] | None = None,
    device: torch.device = CPU,
) -> ModelBundle:
    return PLUGIN.load(list(roles), CONFIG, device=device, seed=5, weights=weights or {}, shard=how)


def inputs() -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 2, 4, 6, generator=generator)
    t = 1000 * torch.rand(2, generator=generator)
    return x, t, Condition({"text": torch.randn(2, 6, 16, generator=generator)})


def adapter_of(bundle: ModelBundle, folder: Path | str) -> WanAdapter:
    return WanAdapter(bundle, PLUGIN, CONFIG, source=str(folder))


@torch.no_grad()
def outputs(bundle: ModelBundle, folder: Path | str) -> dict[str, bytes]:
    """Return the bits of each role's prediction."""
    adapter = adapter_of(bundle, folder)
    return {role: _bits(adapter.forward(role, *inputs())) for role in bundle.roles}


def tangents(folder: str, hows: Iterable[Shard]) -> list[bytes]:
    """Return the bits of v and its derivative, of a student sharded in each of the ways."""
    x, t, cond = inputs()
    outputs = []
    for how in hows:
        bundle = load([spec(folder, "student", trainable=True)], how)
        adapter = adapter_of(bundle, folder)
        v, change = adapter.forward_jvp("student", x, t, cond, dx=x.flip(0), dt=t)
        assert change.any()
        outputs.append(_bits(v) + _bits(change))
    return outputs


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


def weights_of(bundle: ModelBundle) -> dict[str, tuple[str, bytes]]:
    """Return type and bits of every full parameter."""
    full = {
        f"{key}.{name}": value.full_tensor() if isinstance(value, DTensor) else value
        for key, module in bundle.by_module("modules").items()
        for name, value in module.state_dict().items()
    }
    return {name: (str(value.dtype), _bits(value.float())) for name, value in full.items()}


def parameters(bundle: ModelBundle, role: str) -> dict[str, Tensor]:
    return dict(bundle[role].modules["transformer"].named_parameters())


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@frozen(eq=False)
class Read(WeightSource):
    """Counts the numbers that are read of a source."""

    source: WeightSource
    counts: dict[str, int]

    @property
    def where(self) -> str:
        return self.source.where

    def describe(self) -> Any:
        return self.source.describe()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        tensors = self.source.read(names)
        self.counts.update({name: tensor.numel() for name, tensor in tensors.items()})
        return tensors

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        rows = self.source.read_rows(name, start, stop)
        self.counts[name] = rows.numel()
        return rows


# -- what a rank does -------------------------------------------------------------------------

Found = tuple[dict[str, bytes], dict[str, tuple[str, bytes]]]
"""(outputs by role, weights)."""


def outputs_of_ways(
    folder: Path, roles: list[RoleSpec], ways: Iterable[Shard] = (no_sharding,)
) -> list[Found]:
    """Return the outputs for each way of sharding, or the error of loading."""
    bundles = (load(roles, way) for way in ways)
    return [(outputs(bundle, folder), weights_of(bundle)) for bundle in bundles]


def read_by_each(folder: Path, roles: list[RoleSpec], way: Shard) -> tuple[dict, dict]:
    """(numbers read, numbers held), by name, of a teacher that comes from a source."""
    source = Read(PLUGIN.weights(str(folder))["transformer"], {})
    bundle = load(roles, way, {"teacher": {"transformer": source}})
    local_sizes = {name: local(p).numel() for name, p in parameters(bundle, "teacher").items()}
    return source.counts, local_sizes


def loading_error(folder: Path, other: Path) -> dict[str, str]:
    """Return this rank's error where one rank cannot load; "loaded" without one.

    Args:
        other: a folder of another model.
    """
    rank = distributed.get_rank()
    teacher = [spec(folder)]
    theirs = [spec(other if rank == 1 else folder)]
    return {
        "rank 0 cannot read": _told(teacher, no_sharding, _failing(folder, rank == 0)),
        "rank 1 need not read": _told(teacher, no_sharding, _failing(folder, rank == 1)),
        "rank 1 cannot read its part": _told(teacher, shard, _failing(folder, rank == 1)),
        "rank 1 has another model": _told(theirs, no_sharding, {}),
    }


def _failing(folder: Path, fails: bool) -> dict[str, dict[str, WeightSource]]:
    source = PLUGIN.weights(str(folder))["transformer"]
    return {"teacher": {"transformer": Broken(source) if fails else source}}


def _told(roles: list[RoleSpec], way: Shard, weights: Any) -> str:
    try:
        load(roles, way, weights)
    except DistillError as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


@frozen(eq=False)
class Broken(WeightSource):
    """Its facts can be had, its numbers not."""

    source: WeightSource

    @property
    def where(self) -> str:
        return self.source.where

    def describe(self) -> Any:
        return self.source.describe()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        raise OSError(5, "Input/output error")


def train_beside_base(folder: Path, way: Shard) -> dict[str, Any]:
    """Train two steps of each role beside a base, on one process or more; describe all roles."""
    bundle = load(trio(folder), way)
    teacher = parameters(bundle, "teacher")
    shared = {
        role: _same_storage(parameters(bundle, role), teacher) for role in ("student", "critic")
    }
    before = weights_of(bundle)
    adapter = adapter_of(bundle, folder)
    gradients: dict[str, set[str]] = {}
    for role in ("student", "critic"):
        handle = bundle[role]
        optimizer = torch.optim.AdamW(handle.trained_parameters("transformer").values(), lr=0.1)
        for _ in range(2):
            adapter.forward(role, *inputs()).square().mean().backward()
            gradients[role] = {
                f"{other}.{name}"
                for other in bundle.roles
                for name, p in parameters(bundle, other).items()
                if p.grad is not None
            }
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    after = weights_of(bundle)
    return {
        "shared": shared,
        "gradients": gradients,
        "moved": {name for name, bits in after.items() if bits != before[name]},
        "outputs": outputs(bundle, folder),
    }


def _same_storage(guest: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, bool]:
    """Return, by name of the base's parameter, whether the other role's is in the same memory."""
    return {
        base_name(name): not local(value).numel()
        or local(value).data_ptr() == local(base[base_name(name)]).data_ptr()
        for name, value in guest.items()
        if not is_adapter(name)
    }


def gradients(folder: Path, roles: list[RoleSpec], way: Shard = no_sharding) -> dict[str, bytes]:
    """Return the bits (fp32) of each full gradient of a loss of each role."""
    bundle = load(roles, way)
    adapter = adapter_of(bundle, folder)
    for role in bundle.roles:
        for name, parameter in bundle[role].trained_parameters("transformer").items():
            if ".lora_B." in name:  # they begin at zero, where A has no gradient
                torch.nn.init.constant_(local(parameter).detach(), 0.05)
        adapter.forward(role, *inputs()).square().mean().backward()
    return {
        f"{role}.{name}": _bits(g.full_tensor() if isinstance(g, DTensor) else g)
        for role in bundle.roles
        for name, p in parameters(bundle, role).items()
        if (g := p.grad) is not None
    }


graph_calls: list[str] = []
"""One entry for each call of what was compiled with the backend ``counted``."""


@torch._dynamo.register_backend
def counted(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    """Runs a graph as it is."""

    def run(*args: Any) -> Any:
        graph_calls.append(graph.__class__.__name__)
        return graph.forward(*args)

    return run


def compiled_gradients(
    folder: Path, roles: list[RoleSpec], way: Shard
) -> tuple[dict[str, bytes], int]:
    """Return ``gradients`` and the number of calls that went through a graph."""
    graph_calls.clear()
    return gradients(folder, roles, way), len(graph_calls)


def error_of_mixture(folder: Path) -> str:
    """Return the error of a sharded base with an unsharded role beside it."""

    def mixed(role: RoleHandle) -> None:
        if not role.trainable:
            shard(role)

    return _told(trio(folder), mixed, {})
