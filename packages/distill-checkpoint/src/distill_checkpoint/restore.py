"""How a run gets its state back: compared first, then read to where it stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from distill_protocols import Callback, CheckpointError, RunState, TensorInfo
from distill_runtime import Ranks
from torch import Tensor

from distill_checkpoint.files import read_json
from distill_checkpoint.fitting import CALLBACKS, Fit
from distill_checkpoint.layout import part_path, rank_key, role_folder
from distill_checkpoint.optimizers import groups_problem, load_optimizer_state
from distill_checkpoint.parts import averages, modules, optimizers, schedulers, weights
from distill_checkpoint.tensors import StoredTensors, read_tensors
from distill_checkpoint.values import pack, unpack


def check_fit(folder: Path, run: RunState, fit: Fit) -> None:
    """Compare names, shapes and dtypes, so that a checkpoint of another run changes nothing.

    Raises:
        CheckpointError: what was saved and what the run has are not the same (with the names).
    """
    if fit.problems:
        raise CheckpointError(
            f"{folder} does not fit this run: {'; '.join(fit.problems)}. Both must hold the same, "
            "because a part left out would start afresh without a sign. Resume with the run file "
            "of the saved run (its config.json), or start afresh in a new output folder, or say "
            f"in the run file that it is meant:\n{fit.way_out}"
        )
    problems = [*_weight_problems(folder, run, fit), *_average_problems(folder, run, fit)]
    problems += _optimizer_problems(folder, run, fit)
    if problems:
        raise CheckpointError(
            f"{folder} does not fit this run: {'; '.join(problems)}. Both must hold the same, or "
            "state would go to the wrong place. Resume with the models and optimizer groups of the "
            "saved run (its config.json), or start afresh in a new output folder."
        )


def load_state(
    folder: Path, run: RunState, callbacks: Mapping[str, Callback], fit: Fit, ranks: Ranks
) -> list[str]:
    """Put the state in ``folder`` back into ``run``; returns what there is to say.

    Weights and averages are read into their own tensors and each moment to where it stays, one
    module at a time, so that it needs no more memory than the run itself.
    """
    bundle = run.method.bundle
    for role, key in fit.parts("roles"):
        handle = bundle.roles[role]
        StoredTensors(role_folder(folder, role, key)).read_into(weights(handle, key))
    for role, key in fit.parts("optimizers"):
        path = part_path(folder, "optimizers", role, key)
        load_optimizer_state(
            bundle.roles[role].optimizers[key],
            bundle.roles[role].trained_parameters(key),
            _json(path),
            StoredTensors(path),
            f"{role}.{key}",
        )
    for role, key in fit.parts("schedulers"):
        path = part_path(folder, "schedulers", role, key)
        schedulers(bundle)[role, key].load_state_dict(_load(path))
    _load_averages(folder, run, fit)
    for thing in fit.load:
        if thing[0] == CALLBACKS:
            callbacks[thing[1]].load_state_dict(_load(part_path(folder, CALLBACKS, thing[1])))
    run.method.load_state_dict(_method_state(_load(folder / "method"), fit))
    run.micro_steps = read_json(folder / "loop.json")["micro_steps"]
    return _load_of_rank(folder, run, ranks)


def _load_averages(folder: Path, run: RunState, fit: Fit) -> None:
    for part, average in averages(run.method.bundle).items():
        if part in fit.parts("ema"):
            path = part_path(folder, "ema", *part)
            state = average.state_dict()
            _, mine = pack(state, f"ema of {'.'.join(part)}")
            StoredTensors(path).read_into(mine)
            average.load_state_dict(unpack(_json(path), mine))
        elif part in fit.parts("roles"):
            # It was made from the weights of a run that had not resumed yet.
            _start_from(average.weights(), weights(run.method.bundle.roles[part[0]], part[1]))


@torch.no_grad()
def _start_from(average: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    for name, value in average.items():
        value.copy_(live[name])


def _method_state(state: dict[str, Any], fit: Fit) -> dict[str, Any]:
    """Without the update counts of optimizers that are gone, or start anew."""
    kept = {".".join(part) for part in fit.parts("optimizers")}
    return {**state, "updates": {k: n for k, n in state["updates"].items() if k in kept}}


def _load_of_rank(folder: Path, run: RunState, ranks: Ranks) -> list[str]:
    """Data position and generators; last, as anything before may have drawn."""
    positions, states = _load(folder / "loader"), _load(folder / "rng")
    mine, first = rank_key(ranks.rank), rank_key(0)
    # With as many ranks as then each has its own; otherwise the position of all together counts.
    same = len(positions) == ranks.size
    run.loader.load_state_dict(positions[mine if same else first])
    if mine in states:
        _restore_random_state(run, states[mine])
    else:
        run.streams.load_state_dict(states[first]["streams"], shared_only=True)
    if same:
        return []
    new = max(0, ranks.size - len(states))
    return [
        f"{len(states)} rank(s) saved, {ranks.size} go on: tensors and data position are exact"
        + (f"; the generators of {new} new rank(s) start from the seed" if new else "")
    ]


def _restore_random_state(run: RunState, state: Mapping[str, Any]) -> None:
    run.streams.load_state_dict(state["streams"])
    torch.set_rng_state(state["torch"]["cpu"])
    if "cuda" in state["torch"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["torch"]["cuda"])


# -- does it fit ----------------------------------------------------------------------------------


def _weight_problems(folder: Path, run: RunState, fit: Fit) -> list[str]:
    problems = []
    for (role, key), handle in modules(run.method.bundle).items():
        if (role, key) in fit.parts("roles"):
            saved = StoredTensors(role_folder(folder, role, key)).infos
            problems += _misfits(f"weight of {role}.{key}:", saved, weights(handle, key))
    return problems


def _average_problems(folder: Path, run: RunState, fit: Fit) -> list[str]:
    problems = []
    for part, average in averages(run.method.bundle).items():
        if part in fit.parts("ema"):
            where = f"EMA of {'.'.join(part)}:"
            _, mine = pack(average.state_dict(), where)
            saved = StoredTensors(part_path(folder, "ema", *part)).infos
            problems += _misfits(where, saved, mine)
    return problems


def _optimizer_problems(folder: Path, run: RunState, fit: Fit) -> list[str]:
    found = [
        groups_problem(
            optimizer,
            run.method.bundle.roles[role].trained_parameters(key),
            _json(part_path(folder, "optimizers", role, key)),
            f"{role}.{key}",
        )
        for (role, key), optimizer in optimizers(run.method.bundle).items()
        if (role, key) in fit.parts("optimizers")
    ]
    return [problem for problem in found if problem]


def _misfits(
    where: str, saved: Mapping[str, TensorInfo], present: Mapping[str, Tensor]
) -> list[str]:
    """A line for what is missing, unknown, or of another shape or dtype; some names of each."""
    mine = {name: TensorInfo(tuple(v.shape), v.dtype) for name, v in present.items()}
    lost, new = sorted(saved.keys() - mine.keys()), sorted(mine.keys() - saved.keys())
    problems = []
    if lost:
        problems.append(f"{where} {_some(lost)} is in the checkpoint but not in the run")
    if new:
        problems.append(f"{where} {_some(new)} is in the run but not in the checkpoint")
    other = [
        f"{name} is {saved[name]} in the checkpoint and {mine[name]} in the run"
        for name in sorted(saved.keys() & mine.keys())
        if saved[name] != mine[name]
    ]
    return [*problems, *([f"{where} {_some(other)}"] if other else [])]


def _some(items: Sequence[str], most: int = 4) -> str:
    """A model of another size differs in hundreds."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


# -- one thing ------------------------------------------------------------------------------------


def _load(path: Path) -> Any:
    return unpack(_json(path), read_tensors(path))


def _json(path: Path) -> Any:
    return read_json(path.with_name(f"{path.name}.json"))
