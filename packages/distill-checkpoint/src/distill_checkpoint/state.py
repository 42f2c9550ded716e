"""What of a run is in a checkpoint, and how it is put back.

Only trainable roles' weights are saved: a frozen role is what its source says, and stays there.
Names are the module's own (``state_dict``), so non-persistent buffers are not among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from distill_protocols import Callback, CheckpointError, ModelBundle, RunState
from torch import Tensor, nn

from distill_checkpoint.files import read_json, write_json
from distill_checkpoint.layout import part_path, role_folder
from distill_checkpoint.optimizers import load_optimizer_state, optimizer_state
from distill_checkpoint.tensors import (
    TensorShape,
    read_into,
    read_tensors,
    stored_tensors,
    write_tensors,
)
from distill_checkpoint.values import pack, unpack

RANK = "rank-00000"
"""Generator states are per rank; one process writes the first rank's."""

Part = tuple[str, str]
"""(role, module)."""


def save_state(folder: Path, run: RunState, callbacks: Mapping[str, Callback]) -> None:
    """Write everything that moves in ``run`` into ``folder``.

    Raises:
        CheckpointError: something cannot be written, or holds what a checkpoint cannot.
    """
    bundle = run.method.bundle
    modules = _modules(bundle)
    for (role, key), module in modules.items():
        write_tensors(role_folder(folder, role, key), _weights(module, f"{role}.{key}"))
    for (role, key), (optimizer, module) in _optimizers(bundle).items():
        state = optimizer_state(optimizer, module, f"{role}.{key}")
        _save(part_path(folder, "optimizers", role, key), state)
    for (role, key), scheduler in _schedulers(bundle).items():
        _save(part_path(folder, "schedulers", role, key), scheduler.state_dict())
    for (role, key), average in _averages(bundle).items():
        _save(part_path(folder, "ema", role, key), average.state_dict())
    states = {name: callback.state_dict() for name, callback in callbacks.items()}
    for name, state in states.items():
        if state:
            _save(part_path(folder, "callbacks", name), state)
    _save(folder / "loader", run.loader.state_dict())
    _save(folder / "method", run.method.state_dict())
    _save(folder / "rng", {RANK: _random_state(run)})
    write_json(
        folder / "loop.json",
        {
            "iteration": run.iteration,
            "ranks": 1,
            "roles": _as_lists(modules),
            "optimizers": _as_lists(_optimizers(bundle)),
            "schedulers": _as_lists(_schedulers(bundle)),
            "ema": _as_lists(_averages(bundle)),
            "callbacks": {name: bool(state) for name, state in states.items()},
        },
    )


def non_finite_weights(bundle: ModelBundle) -> list[str]:
    """``role.module: parameter`` of every trained parameter that holds inf or nan."""
    parameters = {
        f"{role}.{key}: {name}": parameter.detach()
        for (role, key), module in _modules(bundle).items()
        for name, parameter in module.named_parameters()
    }
    by_device: dict[torch.device, list[str]] = {}
    for name, value in parameters.items():
        by_device.setdefault(value.device, []).append(name)
    found = []
    for names in by_device.values():
        # One wait for each device, not one a tensor.
        finite = torch.stack([torch.isfinite(parameters[name]).all() for name in names]).tolist()
        found += [name for name, good in zip(names, finite, strict=True) if not good]
    return found


def load_state(folder: Path, run: RunState, callbacks: Mapping[str, Callback]) -> int:
    """Put the state in ``folder`` back into ``run``; returns its iteration.

    Names, shapes and dtypes are compared first: a checkpoint of another run changes nothing.

    Raises:
        CheckpointError: what was saved and what the run has are not the same (with the names).
    """
    bundle = run.method.bundle
    loop = read_json(folder / "loop.json")
    modules = _modules(bundle)
    faults = _differences(loop, bundle, callbacks) or _misfits(folder, modules)
    if faults:
        raise CheckpointError(
            f"{folder} does not fit this run: {'; '.join(faults)}. Both must hold the same, "
            "because a part left out would start afresh without a sign. Resume with the run file "
            "of the saved run (its config.json), or start afresh in a new output folder."
        )
    for (role, key), module in modules.items():
        read_into(role_folder(folder, role, key), _weights(module, f"{role}.{key}"))
    for (role, key), (optimizer, module) in _optimizers(bundle).items():
        state = _load(part_path(folder, "optimizers", role, key))
        load_optimizer_state(optimizer, module, state, f"{role}.{key}")
    for (role, key), scheduler in _schedulers(bundle).items():
        scheduler.load_state_dict(_load(part_path(folder, "schedulers", role, key)))
    for (role, key), average in _averages(bundle).items():
        average.load_state_dict(_load(part_path(folder, "ema", role, key)))
    for name, saved in loop["callbacks"].items():
        if saved:
            callbacks[name].load_state_dict(_load(part_path(folder, "callbacks", name)))
    run.method.load_state_dict(_load(folder / "method"))
    run.loader.load_state_dict(_load(folder / "loader"))
    # Last: anything above may have drawn.
    _restore_random_state(run, _load(folder / "rng")[RANK])
    return loop["iteration"]


# -- one thing ----------------------------------------------------------------------------------


def _save(path: Path, state: Mapping[str, Any]) -> None:
    packed, tensors = pack(state, f"{path.parent.name}/{path.name}")
    path.parent.mkdir(exist_ok=True)
    if tensors:
        write_tensors(path, tensors)
    write_json(_json_of(path), packed)


def _load(path: Path) -> Any:
    tensors = read_tensors(path) if path.is_dir() else {}
    return unpack(read_json(_json_of(path)), tensors)


def _json_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _weights(module: nn.Module, where: str) -> dict[str, Tensor]:
    state = module.state_dict()
    other = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise CheckpointError(
            f"{where}: {', '.join(other)} in its state_dict is no tensor, and only tensors go into "
            "a weight file. Move it into a buffer or out of get_extra_state."
        )
    return state


def _random_state(run: RunState) -> dict[str, Any]:
    # Nothing here draws from torch's own generators; a user's dropout layer does.
    own: dict[str, Tensor] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        own["cuda"] = torch.cuda.get_rng_state()
    return {"streams": run.streams.state_dict(), "torch": own}


def _restore_random_state(run: RunState, state: Mapping[str, Any]) -> None:
    run.streams.load_state_dict(state["streams"])
    torch.set_rng_state(state["torch"]["cpu"])
    if "cuda" in state["torch"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["torch"]["cuda"])


# -- which of everything there is -----------------------------------------------------------------


def _modules(bundle: ModelBundle) -> dict[Part, nn.Module]:
    return {
        (name, key): module
        for name, role in bundle.roles.items()
        if role.trainable
        for key, module in role.modules.items()
    }


def _optimizers(bundle: ModelBundle) -> dict[Part, tuple[torch.optim.Optimizer, nn.Module]]:
    return {
        (name, key): (optimizer, role.modules[key])
        for name, role in bundle.roles.items()
        for key, optimizer in role.optimizers.items()
    }


def _schedulers(bundle: ModelBundle) -> dict[Part, torch.optim.lr_scheduler.LRScheduler]:
    return {(n, k): s for n, role in bundle.roles.items() for k, s in role.schedulers.items()}


def _averages(bundle: ModelBundle) -> dict[Part, Any]:
    return {(n, k): average for n, role in bundle.roles.items() for k, average in role.ema.items()}


def _as_lists(parts: Mapping[Part, Any]) -> list[list[str]]:
    return [list(part) for part in parts]


# -- does it fit ----------------------------------------------------------------------------------


def _differences(
    loop: Mapping[str, Any], bundle: ModelBundle, callbacks: Mapping[str, Callback]
) -> list[str]:
    """One line for each kind of thing of which checkpoint and run have different ones."""
    present = {
        "roles": ("trained module", _modules(bundle)),
        "optimizers": ("optimizer", _optimizers(bundle)),
        "schedulers": ("scheduler", _schedulers(bundle)),
        "ema": ("EMA", _averages(bundle)),
    }
    faults = []
    for kind, (noun, parts) in present.items():
        saved = {tuple(part) for part in loop[kind]}
        faults += _one_sided(
            noun,
            [".".join(part) for part in sorted(saved - set(parts))],
            [".".join(part) for part in sorted(set(parts) - saved)],
        )
    # A callback without state may come and go: nothing of it is lost.
    dropped = [n for n, has_state in loop["callbacks"].items() if has_state and n not in callbacks]
    added = [
        name
        for name, callback in callbacks.items()
        if name not in loop["callbacks"] and callback.state_dict()
    ]
    return faults + _one_sided("callback", sorted(dropped), sorted(added))


def _one_sided(noun: str, only_saved: list[str], only_in_run: list[str]) -> list[str]:
    faults = []
    if only_saved:
        faults.append(f"{noun} {', '.join(only_saved)} is in the checkpoint but not in the run")
    if only_in_run:
        faults.append(f"{noun} {', '.join(only_in_run)} is in the run but not in the checkpoint")
    return faults


def _misfits(folder: Path, modules: Mapping[Part, nn.Module]) -> list[str]:
    """One line for each weight that is missing, unknown, or of another shape or dtype."""
    faults = []
    for (role, key), module in modules.items():
        saved = stored_tensors(role_folder(folder, role, key))
        present = {
            name: TensorShape(tuple(value.shape), value.dtype)
            for name, value in _weights(module, f"{role}.{key}").items()
        }
        where = f"weight of {role}.{key}:"
        faults += _one_sided(
            where, sorted(saved.keys() - present.keys()), sorted(present.keys() - saved.keys())
        )
        faults += [
            f"{where} {name} is {saved[name]} in the checkpoint and {present[name]} in the run"
            for name in sorted(saved.keys() & present.keys())
            if saved[name] != present[name]
        ]
    return faults
