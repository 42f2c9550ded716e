"""The layouts in which FastVideo and Self-Forcing save, recognised by their files.

No tensor is read here.

::

    legacy distillation  checkpoint-<n>/distributed_checkpoint/{generator,critic,real_score}[_2]/
                         model.<fqn>, optimizer.state.<fqn>.<moment>
                         ema_local_shard/generator_ema[_2]_rank<R>.pt
                         ema/generator_ema[_2].safetensors
    legacy finetune      checkpoint-<n>/distributed_checkpoint/.metadata
    newer                checkpoint-<n>/{metadata.json, dcp/}
                         roles.<role>.<module>.<fqn>, callbacks.<name>.<role>_ema.<fqn>
    weights only         checkpoint-<n>_weight_only/generator[_2]_inference_transformer/
    one transformer      config.json, diffusion_pytorch_model.safetensors
                         (ema[_2]_checkpoint-<n>/, transformer/ ...)
    one file             ode_init.pt: {"generator": ..., "critic": ..., "generator_ema": ...}
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve, frozen
from distill_protocols import CheckpointError, ForeignNames, TensorWeights, WeightSource
from distill_runtime import UnreadableFileError, read_json
from torch import Tensor

from distill_checkpoint.foreign.files import (
    Joined,
    RankShards,
    Renamed,
    SafetensorsFile,
    as_tensors,
    first_of,
    load_pt,
    rename_strictly,
)
from distill_checkpoint.foreign.safe_dcp import DcpCheckpoint, is_dcp, open_dcp

THEIR_ROLES: Mapping[str, str] = {
    "generator": "student",
    "critic": "critic",
    "real_score": "teacher",
}
"""Legacy name -> ours. The newer layout states ``student`` and so on itself."""

_DISTRIBUTED = "distributed_checkpoint"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_SECOND = re.compile(r"(?:ema_2_checkpoint-\d+|transformer_2|\w+_2_inference_transformer)")
"""Folders of one transformer that are the low-noise expert's; others may hold `_2` by chance."""


@frozen(kw_only=True)
class MigratedRole:
    """One module of one role, under our names.

    Attributes:
        weights: as they were trained.
        ema: their average, if there is one.
        moments: the optimizer's, ``exp_avg.<name>`` and ``exp_avg_sq.<name>``, if there are any.
    """

    role: str
    module: str
    weights: WeightSource
    ema: WeightSource | None = None
    moments: WeightSource | None = None


@frozen(kw_only=True)
class ForeignCheckpoint:
    """What can be taken from a folder or a file of another framework.

    Attributes:
        layout: which of those above.
        iteration: how far it had come; 0 where it is not recorded.
        roles: what can be taken.
        left: a line for each thing that is not taken, with the reason.
        config: the run file of the other framework, where it kept it.
    """

    layout: str
    iteration: int
    roles: tuple[MigratedRole, ...]
    left: tuple[str, ...]
    config: Any = None


def describe_checkpoint(
    source: Path, names: ForeignNames, *, ema: bool = True
) -> ForeignCheckpoint:
    """Recognise the layout of ``source`` and describe what is in it.

    Args:
        names: the family's.
        ema: False leaves averages out.

    Raises:
        CheckpointError: none of the layouts, or one that is damaged, that holds names the family
            does not know, whose averages do not fit, or that would run code.
    """
    if source.suffix == ".safetensors":
        return _one_transformer(source, source, names)
    if source.is_file():
        return _one_file(source, names, ema)
    for layout, holds, describe in _LAYOUTS:
        if holds(source):
            checkpoint = describe(source, names, ema)
            if not checkpoint.roles:
                raise CheckpointError(
                    f"{source} is a {layout} without a single weight: "
                    f"{'; '.join(checkpoint.left)}. Name a checkpoint that was saved in training"
                )
            return checkpoint
    raise _unknown_layout(source)


# -- legacy ---------------------------------------------------------------------------------------


def _legacy_distillation(source: Path, names: ForeignNames, ema: bool) -> ForeignCheckpoint:
    roles: list[MigratedRole] = []
    left: list[str] = []
    for folder in _dcp_below(source / _DISTRIBUTED):
        base, module = _role_and_module(folder.name)
        if base not in THEIR_ROLES:
            kept = " (random state)" if folder.name == "shared" else ""
            left.append(f"{_DISTRIBUTED}/{folder.name}{kept}: no role")
            continue
        saved = open_dcp(folder)
        weights = _below_prefix(saved, "model.")
        if not weights.names:
            left.append(f"{_DISTRIBUTED}/{folder.name}: no weights in it, as it was not trained")
            continue
        role = MigratedRole(
            role=THEIR_ROLES[base],
            module=module,
            weights=rename_strictly(weights, names),
            moments=_moments(saved, "optimizer.state.", names),
        )
        roles.append(_with_average(role, source, folder.name, names, ema, left))
        left += _entries_left(
            saved, ("model.", "optimizer.state."), f"{_DISTRIBUTED}/{folder.name}"
        )
    left += [f"{f.name}: again the weights of {_DISTRIBUTED}" for f in _inference_folders(source)]
    return _describe("a legacy distillation checkpoint", source, roles, left)


def _legacy_finetuning(source: Path, names: ForeignNames, ema: bool) -> ForeignCheckpoint:
    saved = open_dcp(source / _DISTRIBUTED)
    weights = _below_prefix(saved, "model.")
    left = _entries_left(saved, ("model.", "optimizer.state."), _DISTRIBUTED)
    if not weights.names:
        return _describe("a legacy finetuning checkpoint", source, [], left)
    role = MigratedRole(
        role=THEIR_ROLES["generator"],
        module="transformer",
        weights=rename_strictly(weights, names),
        moments=_moments(saved, "optimizer.state.", names),
    )
    if (source / "transformer").is_dir():
        left.append(f"transformer: again the weights of {_DISTRIBUTED}")
    return _describe("a legacy finetuning checkpoint", source, [role], left)


def _weights_only(source: Path, names: ForeignNames, ema: bool) -> ForeignCheckpoint:
    roles = []
    left: list[str] = []
    for folder in _inference_folders(source):
        name = folder.name.removesuffix("_inference_transformer")
        base, module = _role_and_module(name)
        role = MigratedRole(
            role=THEIR_ROLES[base],
            module=module,
            weights=rename_strictly(SafetensorsFile(folder / _WEIGHTS), names),
        )
        roles.append(_with_average(role, source, name, names, ema, left))
    return _describe("a weights-only checkpoint", source, roles, left)


def _transformers_folder(source: Path, names: ForeignNames, ema: bool) -> ForeignCheckpoint:
    return _one_transformer(source, source / _WEIGHTS, names)


def _one_transformer(source: Path, file: Path, names: ForeignNames) -> ForeignCheckpoint:
    role = MigratedRole(
        role=THEIR_ROLES["generator"],
        module="transformer_2" if _SECOND.fullmatch(source.name) else "transformer",
        weights=rename_strictly(SafetensorsFile(file), names),
    )
    kind = "a transformer's file" if file == source else "a transformer's folder"
    return _describe(kind, source, [role], [])


def _with_average(
    role: MigratedRole, source: Path, name: str, names: ForeignNames, ema: bool, left: list[str]
) -> MigratedRole:
    """Add the average of ``name`` to ``role``: the fp32 pieces of all ranks if they make it up, or
    else the one file, which is in the model's own dtype."""
    base, number = _role_and_module(name)
    stem = f"{base}_ema" + ("_2" if number == "transformer_2" else "")
    pieces = _rank_files(source / "ema_local_shard", stem)
    one_file = source / "ema" / f"{stem}.safetensors"
    if not pieces and not one_file.is_file():
        return role
    if not ema:
        left.append(f"the average of {role.role}.{role.module}: not asked for")
        return role
    if pieces:
        average = rename_strictly(_shards(source / "ema_local_shard", pieces), names)
        problem = _mismatch(average, role.weights)
        if problem is None:
            if one_file.is_file():
                left.append(
                    f"ema/{one_file.name}: again the average of ema_local_shard, not in fp32"
                )
            return evolve(role, ema=average)
        if not one_file.is_file():
            raise CheckpointError(
                f"{source / 'ema_local_shard'}: the {len(pieces)} files {stem}_rank<R>.pt do not "
                f"make up the average of {role.role}.{role.module}: {problem}. Pieces are joined "
                "along the first dimension, in the order of the ranks (FSDP2's Shard(0)); they "
                "were cut otherwise, or some are missing. Find the others, or leave averages out"
            )
        left.append(f"ema_local_shard/{stem}_rank<R>.pt: {problem}; ema/{one_file.name} is taken")
    average = rename_strictly(SafetensorsFile(one_file), names)
    problem = _mismatch(average, role.weights)
    if problem is not None:
        raise CheckpointError(
            f"{one_file} is not the average of {role.role}.{role.module}: {problem}. They must be "
            "of one model; leave averages out if it is of another"
        )
    return evolve(role, ema=average)


def _rank_files(folder: Path, stem: str) -> list[Path]:
    """List the files of ranks 0, 1, 2 ... in this order."""
    by_rank = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(rf"{re.escape(stem)}_rank(\d+)\.pt", path.name))
    }
    if sorted(by_rank) != list(range(len(by_rank))):
        raise CheckpointError(
            f"{folder}: there are files {stem}_rank<R>.pt of ranks {sorted(by_rank)} only, and "
            "every rank holds a piece of each weight. Copy the others too, or leave averages out"
        )
    return [by_rank[rank] for rank in sorted(by_rank)]


def _shards(folder: Path, files: Sequence[Path]) -> WeightSource:
    ranks: list[Mapping[str, Tensor]] = [as_tensors(load_pt(file), str(file)) for file in files]
    for file, rank in zip(files, ranks, strict=True):
        if rank.keys() != ranks[0].keys():
            raise CheckpointError(
                f"{file} holds other names than {files[0].name}; all ranks hold a piece of each "
                "weight, so one of them is of another run. Copy the folder again"
            )
    return RankShards(str(folder), ranks)


# -- newer ----------------------------------------------------------------------------------------

_ROLE = re.compile(r"roles\.([^.]+)\.([^.]+)\.")
_AVERAGE = re.compile(r"callbacks\.([^.]+)\.([^.]+)_ema\.")


def _newer(source: Path, names: ForeignNames, ema: bool) -> ForeignCheckpoint:
    saved = open_dcp(source / "dcp")
    metadata = _metadata_json(source / "metadata.json")
    averages = {m[2]: m for n in saved.tensors if (m := _AVERAGE.match(n))}
    taken = ["roles."]
    left: list[str] = []
    roles: list[MigratedRole] = []
    for prefix in sorted({m[0] for n in saved.tensors if (m := _ROLE.match(n))}):
        _, name, module, _ = prefix.split(".")
        state = f"optimizers.{name}.state."
        role = MigratedRole(
            role=name,
            module=module,
            weights=rename_strictly(_below_prefix(saved, prefix), names),
            moments=_moments(saved, f"{state}{module}.", names),
        )
        taken.append(state)
        # Only the main module is averaged there.
        if name in averages and module == "transformer":
            taken.append(averages[name][0])
            role = _with_callbacks_average(role, saved, averages[name], names, ema, left)
        roles.append(role)
    left += _entries_left(saved, taken, "dcp")
    left += [f"{path.name}: random state" for path in sorted(source.glob("rng_state*.pt"))]
    checkpoint = _describe("a newer checkpoint", source, roles, left)
    step = metadata.get("step")
    if type(step) is int and step >= 0:
        checkpoint = evolve(checkpoint, iteration=step)
    return evolve(checkpoint, config=metadata.get("config"))


def _with_callbacks_average(
    role: MigratedRole,
    saved: DcpCheckpoint,
    match: re.Match[str],
    names: ForeignNames,
    ema: bool,
    left: list[str],
) -> MigratedRole:
    what = f"the average of {role.role}.{role.module}"
    if not ema:
        left.append(f"{what}: not asked for")
        return role
    begun = f"callbacks.{match[1]}.ema_started"
    if begun in saved.values and saved.read_value(begun) is False:
        left.append(f"{what}: it had not begun, so it is a copy of the first weights")
        return role
    average = rename_strictly(_below_prefix(saved, match[0]), names)
    problem = _mismatch(average, role.weights)
    if problem is not None:
        raise CheckpointError(
            f"{saved.where}: {what} is not whole: {problem}. Each rank saved its piece under one "
            "name, and one rank's alone was kept, so that the others' are lost. Take the weights "
            "without the average"
        )
    return evolve(role, ema=average)


# -- one file -------------------------------------------------------------------------------------


def _one_file(source: Path, names: ForeignNames, ema: bool) -> ForeignCheckpoint:
    content = load_pt(source)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{source} holds a {type(content).__name__}, where a mapping with "
            f"{', '.join(THEIR_ROLES)} or a state dict must be; save it as such"
        )
    if not any(name in content for name in THEIR_ROLES):
        if not content or any(type(value) is not Tensor for value in content.values()):
            raise CheckpointError(
                f"{source} has {first_of([str(key) for key in content]) or 'nothing'} at its top, "
                f"and none of {', '.join(THEIR_ROLES)}, nor is it a state dict alone: there are no "
                "weights to take. Save it as torch.save({'generator': state_dict}, ...)"
            )
        content = {"generator": content}
    roles: list[MigratedRole] = []
    left: list[str] = []
    for theirs in [name for name in THEIR_ROLES if name in content]:
        role = MigratedRole(
            role=THEIR_ROLES[theirs],
            module="transformer",
            weights=rename_strictly(_tensors_of(source, content, theirs), names),
        )
        name = f"{theirs}_ema"
        if name in content and not ema:
            left.append(f"{name}: not asked for")
        # A file without an average may have None or {} in its place.
        elif isinstance(content.get(name), Tensor) or content.get(name):
            average = rename_strictly(_tensors_of(source, content, name), names)
            problem = _mismatch(average, role.weights)
            if problem is not None:
                raise CheckpointError(
                    f"{source}: {name} is not the average of {theirs}: {problem}. They must be of "
                    "one model; leave averages out if it is of another"
                )
            role = evolve(role, ema=average)
        roles.append(role)
    known = {*THEIR_ROLES, *(f"{name}_ema" for name in THEIR_ROLES)}
    left += [f"{key}: no weights of a role" for key in content if key not in known]
    return _describe("a file", source, roles, left)


def _tensors_of(source: Path, content: Mapping[str, object], name: str) -> WeightSource:
    where = f"{source} ({name})"
    return TensorWeights(where, as_tensors(content[name], where))


# -- what they share ------------------------------------------------------------------------------


def _below_prefix(saved: DcpCheckpoint, prefix: str, suffix: str = "") -> Renamed:
    """Return the tensors ``<prefix><name><suffix>`` by ``name``."""
    return Renamed(
        saved,
        {
            full[len(prefix) : len(full) - len(suffix)]: full
            for full in saved.tensors
            if full.startswith(prefix) and full.endswith(suffix)
        },
    )


def _moments(saved: DcpCheckpoint, prefix: str, names: ForeignNames) -> WeightSource | None:
    by_kind = {kind: _below_prefix(saved, prefix, f".{kind}") for kind in _MOMENTS}
    parts = {kind: rename_strictly(part, names) for kind, part in by_kind.items() if part.names}
    return Joined(parts) if parts else None


def _mismatch(average: WeightSource, weights: WeightSource) -> str | None:
    """Tell why ``average`` cannot be that of ``weights``; None: it can."""
    averaged = {name: info.size for name, info in average.describe().items()}
    sizes = {name: info.size for name, info in weights.describe().items()}
    if averaged == sizes:
        return None
    one_sided = sorted(averaged.keys() ^ sizes.keys())
    if one_sided:
        return f"only one of the two has {first_of(one_sided)}"
    name = next(name for name in sizes if averaged[name] != sizes[name])
    return f"{name} is {list(averaged[name])} in it and {list(sizes[name])} in the weights"


def _entries_left(saved: DcpCheckpoint, taken: Iterable[str], where: str) -> list[str]:
    """Return a line for each group of entries that is not taken."""
    prefixes = tuple(taken)
    counts = Counter(
        name.split(".")[0]
        for name in sorted([*saved.tensors, *saved.values])
        if not name.startswith(prefixes)
    )
    return [f"{where}: {group} ({count} entries)" for group, count in counts.items()]


def _role_and_module(name: str) -> tuple[str, str]:
    """``generator_2`` -> (``generator``, ``transformer_2``)."""
    base = name.removesuffix("_2")
    return base, "transformer" if base == name else "transformer_2"


def _dcp_below(folder: Path) -> Iterator[Path]:
    yield from (path for path in sorted(folder.iterdir()) if is_dcp(path))


def _inference_folders(source: Path) -> list[Path]:
    return [
        source / f"{base}{number}_inference_transformer"
        for base in THEIR_ROLES
        for number in ("", "_2")
        if (source / f"{base}{number}_inference_transformer" / _WEIGHTS).is_file()
    ]


def _describe(
    layout: str, source: Path, roles: Sequence[MigratedRole], left: list[str]
) -> ForeignCheckpoint:
    number = re.search(r"checkpoint-(\d+)", source.resolve().name)
    return ForeignCheckpoint(
        layout=layout,
        iteration=int(number[1]) if number else 0,
        roles=tuple(roles),
        left=tuple(left),
    )


def _metadata_json(file: Path) -> Mapping[str, object]:
    try:
        value = read_json(file)
    except UnreadableFileError as error:
        raise CheckpointError(f"{error}; copy the checkpoint again") from error
    return value if isinstance(value, dict) else {}


_LAYOUTS: Sequence[
    tuple[str, Callable[[Path], bool], Callable[[Path, ForeignNames, bool], ForeignCheckpoint]]
] = (
    (
        "newer checkpoint (metadata.json, dcp/.metadata)",
        lambda path: (path / "metadata.json").is_file() and is_dcp(path / "dcp"),
        _newer,
    ),
    (
        f"legacy finetuning checkpoint ({_DISTRIBUTED}/.metadata)",
        lambda path: is_dcp(path / _DISTRIBUTED),
        _legacy_finetuning,
    ),
    (
        f"legacy distillation checkpoint ({_DISTRIBUTED}/{{{','.join(THEIR_ROLES)}}}/.metadata)",
        lambda path: (path / _DISTRIBUTED).is_dir() and any(_dcp_below(path / _DISTRIBUTED)),
        _legacy_distillation,
    ),
    (
        f"weights-only checkpoint (generator_inference_transformer/{_WEIGHTS})",
        lambda path: bool(_inference_folders(path)),
        _weights_only,
    ),
    (
        f"transformer's folder (config.json, {_WEIGHTS})",
        lambda path: (path / "config.json").is_file() and (path / _WEIGHTS).is_file(),
        _transformers_folder,
    ),
)


def _unknown_layout(source: Path) -> CheckpointError:
    if not source.exists():
        return CheckpointError(f"{source} does not exist; name a checkpoint's folder or a .pt file")
    present = [path.name for path in sorted(source.iterdir())]
    inside = [name for name in present if re.match(r"(?:ema_)?checkpoint-\d", name)]
    hint = f"one of the checkpoints in it, such as {source / inside[-1]}" if inside else ""
    looked = "; ".join(layout for layout, _, _ in _LAYOUTS)
    return CheckpointError(
        f"{source} holds {first_of(present) or 'nothing'}, which is no layout that can be "
        f"migrated. Looked for: {looked}; or a .pt file with {', '.join(THEIR_ROLES)}. Name "
        f"{hint or 'the folder of one checkpoint'}. Shards of a model's original repository and "
        "LoRAs need no migration: a role can start from them as they are"
    )
