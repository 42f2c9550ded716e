"""Models against their family, and the method against the models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_checkpoint import is_checkpoint_folder, list_checkpoints, role_problems
from distill_protocols import LoraSpec, MethodConfig, Problem, below
from distill_trainer.attention import FLASH_VERSIONS, flash_problem

from distill_runfile.draft import ConfiguredFamily, Draft
from distill_runfile.missing import is_missing, made_by
from distill_runfile.schema import InitFromConfig, Role, is_local
from distill_runfile.source import read_source

_BACKEND = ("attention_backend",)


def check_models(draft: Draft) -> Iterator[Problem]:
    """Rules of the family over its section and each role, and what the method needs of it."""
    family = draft.family
    if family is None:
        return
    yield from below(
        family.plugin.config_problems(family.config, draft.written_roles), "pipeline_config"
    )
    yield from _capability_problems(draft, family)
    kernel = None if draft.training is None else draft.training.attention_backend
    if (
        kernel is not None
        and kernel in FLASH_VERSIONS
        and (problem := flash_problem(kernel)) is not None
    ):
        yield Problem(("training", *_BACKEND), problem)
    of_all: dict[str, list[str]] = {}
    honoured = "attention_backend" in family.plugin.role_options(family.config)
    for name, role in draft.roles.items():
        problems = list(family.plugin.role_problems(role.spec, family.config))
        is_own = draft.role_configs[name].attention_backend is not None
        # Unless the family gives its own reason, or honours no such key of a role at all.
        if all(p.path != _BACKEND for p in problems) and (honoured or not is_own):
            problems += _backend_problems(role, family)
        if not is_own:
            for problem in problems:
                if problem.path == _BACKEND:
                    of_all.setdefault(problem.message, []).append(name)
            problems = [problem for problem in problems if problem.path != _BACKEND]
        yield from below(problems, "models", name)
        if role.init_from is not None and not _comes_from_checkpoint(draft, role):
            problems = _init_problems(draft, role.init_from, role, family)
            yield from below(problems, "models", name, "init_from")
    for message, roles in of_all.items():
        yield Problem(
            ("training", *_BACKEND),
            f"{message} (for {', '.join(roles)}, which name none themselves)",
        )


def check_method(draft: Draft) -> Iterator[Problem]:
    """Rules of the method over the run, and whether every trained role is updated at all."""
    if draft.method is None:
        return
    yield from below(draft.method.config.problems(draft.run), "method_config")
    yield from _never_called(draft, draft.method.config)
    if draft.training is None:
        return
    steps = draft.training.max_train_steps
    # No schedule of updates is longer than this; a run may be.
    iterations = range(1, min(steps, 10_000) + 1)
    updated = {name for i in iterations for name in draft.method.config.turns(i)}
    for name, role in draft.roles.items():
        if role.spec.trainable and name not in updated:
            yield Problem(
                ("training", "max_train_steps"),
                f"{steps} iterations hold no update of {name}, which would come out as it went "
                "in. Train longer, or have it updated more often (method_config)",
            )


def _never_called(draft: Draft, method: MethodConfig) -> Iterator[Problem]:
    """Roles that can be called at some t alone, at which the method calls nothing."""
    for name, (low, high) in draft.run.time_limits.items():
        if name in draft.needs and method.update_share(name, low, high) == 0:
            experts = draft.run.roles[name].experts
            way_out = "Let it, or name the other expert" if experts else "Let it"
            yield Problem(
                ("models", name, "experts") if experts else ("method_config",),
                f"{draft.run.describe_limits(name)}, and this method_config calls {name} at no t "
                f"of these. {way_out}",
            )


def _capability_problems(draft: Draft, family: ConfiguredFamily) -> Iterator[Problem]:
    method = draft.readable_method
    if method is None:
        return
    missing = family.plugin.capabilities(family.config).missing(method.config.capabilities)
    if missing:
        yield Problem(
            ("recipe", "method"),
            f"{method.plugin.name} needs {', '.join(missing)}, which family {family.plugin.name} "
            "with this pipeline_config has not (causal:<role> is a role that pipeline_config lets "
            "make videos chunk by chunk); choose other options of the two, or another family",
        )


def _backend_problems(role: Role, family: ConfiguredFamily) -> Iterator[Problem]:
    backend = role.spec.attention_backend
    if backend is None:
        return
    known = family.plugin.attention_backends(role.spec, family.config)
    if backend not in known:
        yield Problem(
            _BACKEND,
            f"{backend!r} is none that family {family.plugin.name!r} has for this role "
            f"({', '.join(known) or 'it has none'}). Name one of these, or leave it out for the "
            "library's own choice",
        )


# -- weights to start with ------------------------------------------------------------------------


def _comes_from_checkpoint(draft: Draft, role: Role) -> bool:
    """Return whether the run's own checkpoint holds the role, so that nobody reads others again."""
    if draft.training is None or draft.checkpoint is None:
        return False
    return role.comes_from_checkpoint(draft.checkpoint, Path(draft.training.output_dir))


def _init_problems(
    draft: Draft, init_from: InitFromConfig, role: Role, family: ConfiguredFamily
) -> Iterator[Problem]:
    """What is wrong with the weights that a role shall start with; paths are keys of them."""
    path = Path(init_from.path)
    if is_missing(init_from.path):
        if not draft.planning:
            made = made_by(init_from.path, draft.document.main.file)
            yield Problem(("path",), f"{init_from.path} is not there yet{made}, or misspelt")
        return
    stored = is_local(init_from.path) and is_checkpoint_folder(path)
    if role.spec.heads is not None and not stored:
        yield Problem(
            ("path",),
            f"{init_from.path} must be a checkpoint folder, as only those hold discriminators. "
            "Leave init_from out to begin with new heads",
        )
        return
    if stored:
        source = init_from.role or role.spec.name
        problems = list(role_problems(path, source, ema=init_from.ema))
        yield from problems or _stored_problems(path, source, role, family)
        return
    inside = list_checkpoints(path) if is_local(init_from.path) else {}
    if inside:
        yield Problem(
            ("path",),
            f"{path} is a run's output folder; name the checkpoint in it that is meant "
            f"({', '.join(folder.name for folder in list(inside.values())[:3])} ...)",
        )
        return
    for message in family.plugin.start_problems(role.spec, family.config, init_from.path):
        yield Problem(("path",), message)
    if role.spec.lora is not None and not family.plugin.starts_with_adapters(init_from.path):
        yield Problem(
            ("path",), _full_under_lora(init_from.path, role, f"write path: {init_from.path}")
        )
    for key, written in (("ema", init_from.ema), ("role", init_from.role != role.spec.name)):
        if written:
            yield Problem(
                (key,),
                f"{init_from.path} is no checkpoint but a model's weights, of which there is one "
                "set; leave this key out",
            )


def _stored_problems(
    checkpoint: Path, source: str, role: Role, family: ConfiguredFamily
) -> Iterator[Problem]:
    """Compare full weights with full ones, adapters with adapters.

    Adapters carry neither their scale nor their base: both runs must say the same of the scale.
    """
    values: dict[str, Any] | None = read_source(checkpoint / "config.json").values
    if values is None:
        yield Problem(
            ("path",),
            f"{checkpoint} cannot be read: its config.json is missing or damaged; name another "
            "checkpoint",
        )
        return
    try:
        yield from list(_compare_stored(checkpoint, values, source, role, family))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        yield Problem(
            ("path",),
            f"{checkpoint} cannot be read: its config.json does not describe {source!r} as a run "
            f"file would ({type(error).__name__}: {error}); name another checkpoint",
        )


def _compare_stored(
    checkpoint: Path, values: Mapping[str, Any], source: str, role: Role, family: ConfiguredFamily
) -> Iterator[Problem]:
    written = (values.get("models") or {}).get(source) or {}
    if missing := _missing_experts(written.get("experts"), role):
        yield Problem(
            ("path",),
            f"{checkpoint} holds {source} with {', '.join(written['experts'])} alone, and "
            f"{role.spec.name} has {missing}. Give the role the same experts, or export {source} "
            "of it (--format diffusers) and make that the path",
        )
        return
    heads = role.spec.heads and {
        "blocks": list(role.spec.heads.blocks),
        "width": role.spec.heads.width,
    }
    theirs = written.get("heads") and {key: written["heads"][key] for key in ("blocks", "width")}
    if heads != theirs:
        yield Problem(
            ("path",),
            f"{checkpoint} holds {source} as {_describe_heads(theirs)}, and {role.spec.name} is "
            f"{_describe_heads(heads)}; weights of one fit no other. Give both the same heads",
        )
        return
    if heads is not None:
        return
    lora, now = written.get("lora"), role.spec.lora
    if lora is None:
        if now is not None:
            export = f"export {source} of it (--format diffusers) and make that the path"
            yield Problem(("path",), _full_under_lora(checkpoint, role, export))
        path = written.get("path", role.spec.path)
        for message in family.plugin.weights_problems(role.spec, path):
            yield Problem(("path",), f"{checkpoint}: {message}")
        return
    then = LoraSpec(**{**lora, "target_modules": tuple(lora["target_modules"])})
    if now is None or (then.rank, then.scale) != (now.rank, now.scale):
        yield Problem(
            ("path",),
            f"{checkpoint} holds adapters of {source!r} alone, of rank {then.rank} and alpha / "
            f"rank {then.scale:g}, and {role.spec.name} has "
            f"{f'rank {now.rank} and {now.scale:g}' if now else 'no lora'}; the same numbers would "
            "mean other weights. Give the role the same lora, or export that one merged "
            "(--format diffusers) and start from the export",
        )


def _missing_experts(theirs: Sequence[str] | None, role: Role) -> str:
    """Name what ``role`` has beside the experts of a stored one; empty: nothing."""
    if not theirs:
        return ""
    return ", ".join(set(role.spec.experts) - set(theirs)) if role.spec.experts else "all"


def _describe_heads(heads: Mapping[str, Any] | None) -> str:
    if heads is None:
        return "a model"
    return f"heads on blocks {', '.join(map(str, heads['blocks']))} of width {heads['width']}"


def _full_under_lora(start: object, role: Role, way_out: str) -> str:
    return (
        f"{start} holds whole weights, but the base of {role.spec.name}'s lora is what its path "
        "states: checkpoints hold the adapters alone, and an export would merge them into other "
        f"weights than they were trained beside. Without init_from, {way_out}"
    )
