"""How a run gets its state back: compared first, then read to where it stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from distill_protocols import (
    Callback,
    CheckpointError,
    DataError,
    RestartableSchedule,
    RunState,
    TensorInfo,
)
from distill_runtime import Ranks, counted, read_json
from torch import Tensor

from distill_checkpoint.changed_settings import DATA, changes_section
from distill_checkpoint.manifest import (
    Contents,
    json_of,
    method_path,
    rank_key,
    role_folder,
    state_path,
)
from distill_checkpoint.resume_plan import CALLBACKS, ResumePlan
from distill_checkpoint.snapshot import (
    averages,
    module_tensors,
    optimizers,
    schedulers,
    trained_modules,
)
from distill_checkpoint.state_dicts import groups_problem, load_optimizer_state, pack, unpack
from distill_checkpoint.tensors import StoredTensors, read_tensors


def check_plan(folder: Path, run: RunState, plan: ResumePlan) -> None:
    """Compare names, shapes and dtypes, so that a checkpoint of another run changes nothing.

    Raises:
        CheckpointError: what was saved and what the run has are not the same (with the names).
    """
    if plan.problems:
        raise CheckpointError(
            f"{folder} does not fit this run: {'; '.join(plan.problems)}. Both must hold the same, "
            "because a part left out would start afresh without a sign. Resume with the run file "
            "of the saved run (its config.json), or start afresh in a new output folder, or state "
            f"in the settings of checkpoints that it is meant:\n{plan.way_out}"
        )
    problems = [
        *_weight_problems(folder, run, plan),
        *_average_problems(folder, run, plan),
        *_optimizer_problems(folder, run, plan),
    ]
    if problems:
        raise CheckpointError(
            f"{folder} does not fit this run: {'; '.join(problems)}. Both must hold the same, or "
            "state would go to the wrong place. Resume with the models and optimizer groups of the "
            "saved run (its config.json), or start afresh in a new output folder."
        )


def load_state(
    folder: Path,
    contents: Contents,
    run: RunState,
    callbacks: Mapping[str, Callback],
    plan: ResumePlan,
    ranks: Ranks,
) -> list[str]:
    """Put the state in ``folder`` back into ``run``; returns notes for the log.

    Weights and averages are read into their own tensors and each moment to where it stays, one
    module at a time, so that it needs no more memory than the run itself.
    """
    bundle = run.method.bundle
    for role, key in plan.modules("roles"):
        tensors = module_tensors(bundle.roles[role], key)
        StoredTensors(role_folder(folder, role, key)).read_into(tensors)
    for role, key in plan.modules("optimizers"):
        path = state_path(folder, "optimizers", role, key)
        load_optimizer_state(
            bundle.roles[role].optimizers[key],
            bundle.roles[role].trained_parameters(key),
            read_json(json_of(path)),
            StoredTensors(path),
            f"{role}.{key}",
            keep_settings=role in plan.other_settings,
        )
    for (role, key), schedule in schedulers(bundle).items():
        if (role, key) in plan.modules("schedulers"):
            schedule.load_state_dict(_read_state(state_path(folder, "schedulers", role, key)))
        elif isinstance(schedule, RestartableSchedule):
            schedule.start_after(contents.iteration)
    _load_averages(folder, run, plan)
    for name in plan.callbacks:
        callbacks[name].load_state_dict(_read_state(state_path(folder, CALLBACKS, name)))
    method = _read_state(folder / "method")
    # Without the update counts of optimizers that are gone, or start anew.
    loaded = {".".join(module) for module in plan.modules("optimizers")}
    updates = {name: count for name, count in method["updates"].items() if name in loaded}
    run.method.load_state_dict({**method, "updates": updates})
    notes = _load_method_of_rank(folder, contents, run, ranks)
    assert contents.micro_steps is not None  # a checkpoint of weights alone is refused before
    run.micro_steps = contents.micro_steps
    # Last, as anything before may have drawn from torch's own generator.
    return [*notes, *_load_state_of_rank(folder, run, ranks, plan)]


def _load_method_of_rank(
    folder: Path, contents: Contents, run: RunState, ranks: Ranks
) -> list[str]:
    """Load what the method moves on this rank: it is of its samples, so of another number
    of ranks it begins anew."""
    path = method_path(folder, ranks.rank)
    if not method_path(folder, 0).parent.exists():
        run.method.load_rank_state({})
        return []
    if contents.ranks != ranks.size:
        run.method.load_rank_state({})
        return ["what the method holds of each rank's samples (videos in the making) begins anew"]
    run.method.load_rank_state(_read_state(path))
    return []


def _load_averages(folder: Path, run: RunState, plan: ResumePlan) -> None:
    for (role, key), average in averages(run.method.bundle).items():
        if (role, key) in plan.modules("ema"):
            path = state_path(folder, "ema", role, key)
            _, tensors = pack(average.state_dict(), f"ema of {role}.{key}")
            StoredTensors(path).read_into(tensors)
            # The tensors are filled in place; this sets what else an average counts.
            average.load_state_dict(unpack(read_json(json_of(path)), tensors))
        elif (role, key) in plan.modules("roles"):
            # An added average was made from the weights of a run that had not resumed yet.
            live = module_tensors(run.method.bundle.roles[role], key)
            with torch.no_grad():
                for name, value in average.weights().items():
                    value.copy_(live[name])


def _load_state_of_rank(folder: Path, run: RunState, ranks: Ranks, plan: ResumePlan) -> list[str]:
    """Load data position and generators of this rank."""
    positions, states = _read_state(folder / "loader"), _read_state(folder / "rng")
    own, first = rank_key(ranks.rank), rank_key(0)
    # With as many ranks as then each has its own; otherwise the position of all together counts.
    same_ranks = len(positions) == ranks.size
    notes = _load_position(run, positions[own if same_ranks else first], plan)
    if own in states:
        _load_random_state(run, states[own])
    else:
        run.streams.load_state_dict(states[first]["streams"], shared_only=True)
    if same_ranks:
        return notes
    new = max(0, ranks.size - len(states))
    return [
        *notes,
        f"{counted(len(states), 'rank')} saved, {ranks.size} go on: tensors and data position are "
        "exact"
        + (f"; the generators of {counted(new, 'new rank')} start from the seed" if new else ""),
    ]


def _load_position(run: RunState, position: Mapping[str, object], plan: ResumePlan) -> list[str]:
    """Load the data position, unless it is one in another data set and a rule states that it is
    meant: then the loader stays at its beginning.

    Raises:
        DataError: another data set, and no rule.
    """
    try:
        run.loader.load_state_dict(position)
    except DataError as error:
        if plan.takes_other_data:
            return [
                f"{DATA} is dropped and added (changes): another data set than that of the "
                "checkpoint is read, from its beginning"
            ]
        raise DataError(
            f"{error} Or state that another data set is meant, which is then read from its "
            f"beginning:\n{changes_section(added=[DATA], dropped=[DATA])}"
        ) from error
    unused = f"changes: {DATA} matches nothing, so it changes nothing (it is the same data set)"
    return [unused] if plan.takes_other_data else []


def _load_random_state(run: RunState, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    run.streams.load_state_dict(state["streams"])
    torch.set_rng_state(state["torch"]["cpu"])
    if "cuda" in state["torch"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["torch"]["cuda"])


def _read_state(path: Path) -> Any:
    return unpack(read_json(json_of(path)), read_tensors(path))


# -- comparison -----------------------------------------------------------------------------------


def _weight_problems(folder: Path, run: RunState, plan: ResumePlan) -> Iterator[str]:
    for (role, key), handle in trained_modules(run.method.bundle).items():
        if (role, key) in plan.modules("roles"):
            saved = StoredTensors(role_folder(folder, role, key)).infos
            yield from _tensor_problems(
                f"weight of {role}.{key}:", saved, module_tensors(handle, key)
            )


def _average_problems(folder: Path, run: RunState, plan: ResumePlan) -> Iterator[str]:
    for (role, key), average in averages(run.method.bundle).items():
        if (role, key) in plan.modules("ema"):
            where = f"EMA of {role}.{key}:"
            _, present = pack(average.state_dict(), where)
            saved = StoredTensors(state_path(folder, "ema", role, key)).infos
            yield from _tensor_problems(where, saved, present)


def _optimizer_problems(folder: Path, run: RunState, plan: ResumePlan) -> Iterator[str]:
    for (role, key), optimizer in optimizers(run.method.bundle).items():
        if (role, key) in plan.modules("optimizers"):
            problem = groups_problem(
                optimizer,
                run.method.bundle.roles[role].trained_parameters(key),
                read_json(json_of(state_path(folder, "optimizers", role, key))),
                f"{role}.{key}",
            )
            if problem:
                yield problem


def _tensor_problems(
    where: str, saved: Mapping[str, TensorInfo], present: Mapping[str, Tensor]
) -> Iterator[str]:
    """Yield a line for what is missing, unknown, or of another shape or dtype; some names of
    each."""
    infos = {name: TensorInfo(tuple(v.shape), v.dtype) for name, v in present.items()}
    lost, new = sorted(saved.keys() - infos.keys()), sorted(infos.keys() - saved.keys())
    if lost:
        yield f"{where} {_first_of(lost)} is in the checkpoint but not in the run"
    if new:
        yield f"{where} {_first_of(new)} is in the run but not in the checkpoint"
    different = [
        f"{name} is {saved[name]} in the checkpoint and {infos[name]} in the run"
        for name in sorted(saved.keys() & infos.keys())
        if saved[name] != infos[name]
    ]
    if different:
        yield f"{where} {_first_of(different)}"


def _first_of(items: Sequence[str], most: int = 4) -> str:
    """Some of ``items``, and how many more there are: models of other sizes differ in hundreds."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
