"""Checkpoints as FastVideo and Self-Forcing write them, and pickles that run code."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import pickle
import shlex
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

TINY = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 16, "ffn_dim": 30, "num_layers": 2, "rope_max_seq_len": 16,
}  # fmt: skip

Weights = dict[str, Tensor]


@functools.cache
def _sizes(image: bool) -> dict[str, tuple[int, ...]]:
    from accelerate import init_empty_weights
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    extra = {"image_dim": 24, "added_kv_proj_dim": 24} if image else {}
    with init_empty_weights():
        module = WanTransformer3DModel(**TINY, **extra)
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def wan_weights(seed: int, *, dtype: torch.dtype = torch.float32, image: bool = False) -> Weights:
    """Return weights of a tiny Wan under Diffusers' names; each seed gives its own values."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(size, generator=draw).to(dtype) for name, size in _sizes(image).items()
    }


def renamed(weights: Weights, names: Callable[[str], str | None]) -> Weights:
    """Under their own names."""
    return {str(names(name)): value for name, value in weights.items()}


def training_state(weights: Weights, seed: int) -> dict[str, Any]:
    """Return the state that FastVideo keeps of one transformer in training."""
    draw = torch.Generator().manual_seed(seed)
    state: dict[str, Any] = {"dataloader": {"rank": 0, "position": [1, 2]}, "model": weights}
    optimizer: dict[str, Any] = {}
    for name, value in weights.items():
        optimizer[f"state.{name}.step"] = torch.tensor(3.0)
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer[f"state.{name}.{moment}"] = torch.randn(value.shape, generator=draw)
        optimizer[f"param_groups.{name}.lr"] = 1e-5
        optimizer[f"param_groups.{name}.betas"] = (0.0, 0.999)
    return {**state, "optimizer": optimizer, "scheduler": {"scheduler": {"last_epoch": 3}}}


def save_dcp(state: Mapping[str, Any], folder: Path) -> None:
    """Save a DCP checkpoint as one rank does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(state), checkpoint_id=str(folder), no_dist=True)


def save_dcp_sharded(state: Mapping[str, Any], folder: Path, ranks: int) -> None:
    """Save a DCP checkpoint as several ranks, each its rows of a tensor (FSDP2's ``Shard(0)``)."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=_save_as_rank, args=(state, folder, rank, ranks))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * ranks


def _save_as_rank(state: Mapping[str, Any], folder: Path, rank: int, ranks: int) -> None:
    meeting = f"file://{folder.parent / f'.meeting-{folder.name}'}"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, Tensor) and value.ndim:
            return distribute_tensor(value, mesh, [Shard(0)])
        return value

    dcp.save(cut(state), checkpoint_id=str(folder))
    distributed.destroy_process_group()


def rank_pieces(weights: Weights, ranks: int) -> list[Weights]:
    """Split each tensor into the pieces of the ranks; the last may be empty."""

    def pieces(value: Tensor) -> list[Tensor]:
        cut = list(value.chunk(ranks))
        return cut + [value[:0]] * (ranks - len(cut))

    return [
        {n: pieces(v)[rank].float().clone() for n, v in weights.items()} for rank in range(ranks)
    ]


def save_pt(value: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, file)


def save_transformer(weights: Weights, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(TINY))
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")


class Evil:
    """An object that runs a command when it is unpickled; ``touched`` is whether it has."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {shlex.quote(str(self.marker))}",)

    @property
    def touched(self) -> bool:
        return self.marker.exists()

    def assert_runs_code(self) -> None:
        """Assert that unpickling the object runs its command."""
        pickle.loads(pickle.dumps(self))
        assert self.touched
        self.marker.unlink()
