"""Roles against the method that calls them, against each other, and by themselves."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

from attrs import evolve
from distill_protocols import DiscriminatorSpec, Problem, RoleNeed, below

from distill_runfile.draft import Draft
from distill_runfile.roles import FROM_BASE
from distill_runfile.schema import RoleConfig


def check_roles(draft: Draft) -> Iterator[Problem]:
    """Rules over ``models`` that need no family."""
    if draft.readable_method is not None:
        yield from _needed_problems(draft, draft.readable_method.plugin.name)
    for name, role in draft.role_configs.items():
        yield from below(_family_problems(draft, role), "models", name)
        need = draft.needs.get(name)
        discriminator = bool(need and need.features_of)
        problems = _key_problems(name, draft.role_configs, discriminator=discriminator)
        cause = _unreadable_neighbour(draft, role)
        for problem in below(problems, "models", name):
            yield evolve(problem, follows_from=cause)
        if name in draft.roles:
            yield from below(_training_problems(draft, name, role), "models", name)


def _unreadable_neighbour(draft: Draft, role: RoleConfig) -> tuple[str, str] | None:
    """Path of a role that this one refers to, and that could not be read."""
    for name in (role.base, role.heads and role.heads.on):
        if name in draft.written_roles and name not in draft.role_configs:
            return ("models", name)
    return None


def _needed_problems(draft: Draft, method: str) -> Iterator[Problem]:
    needs, configs = draft.needs, draft.role_configs
    for name, need in needs.items():
        if name not in draft.written_roles:
            yield Problem(
                ("models", name),
                f"missing role; {method} calls {', '.join(needs)} "
                f"({name}: {need.help or 'needed'})" + (need.reason and f": {need.reason}"),
            )
        if name not in configs:
            continue
        if configs[name].trainable not in (None, need.trainable):
            yield Problem(("models", name, "trainable"), _wrong_trainable(need, method))
        yield from below(_heads_as_needed(configs, need, method), "models", name, "heads")
    for name in configs:
        if name not in needs:
            near = difflib.get_close_matches(name, needs, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            yield Problem(
                ("models", name),
                f"{method} calls no role {name!r}{hint} (it calls: {', '.join(needs)}); "
                "an unused role only costs memory",
            )


def _wrong_trainable(need: RoleNeed, method: str) -> str:
    if need.trainable:
        return (
            f"{need.name} is frozen here, but {method} updates it. Write trainable: true, or "
            "leave the key out"
        )
    return (
        f"{need.name} is trainable here, but {method} never updates it: it is a fixed target. "
        "Write trainable: false, or leave the key out"
    )


def _heads_as_needed(
    configs: Mapping[str, RoleConfig], need: RoleNeed, method: str
) -> Iterator[Problem]:
    """What is wrong with being a discriminator, or with being none; paths are keys of heads."""
    heads = configs[need.name].heads
    if heads is None and need.features_of:
        yield Problem(
            (),
            f"missing: {method} calls {need.name} as a discriminator ({need.help}). Write heads: "
            f"{{on: {need.features_of[0]}, blocks: [...]}}",
        )
    elif heads is not None and not need.features_of:
        yield Problem(
            (), f"{method} calls {need.name} as a model, and heads are none. Write path instead"
        )
    elif heads is not None and heads.on in configs and heads.on not in need.features_of:
        yield Problem(
            ("on",),
            f"{heads.on!r} is not what {method} takes features of with this method_config; it must "
            f"be {' or '.join(need.features_of)}",
        )


def _family_problems(draft: Draft, role: RoleConfig) -> Iterator[Problem]:
    if draft.recipe is not None and role.family not in (None, draft.recipe.family):
        yield Problem(
            ("family",),
            f"{role.family!r} differs from recipe.family {draft.recipe.family!r}: one adapter "
            "calls all roles, so all belong to one family. Leave the key out",
        )
    if draft.family is None:
        return
    honoured = draft.family.plugin.role_options(draft.family.config)
    for option in role.options_set():
        if option not in honoured:
            yield Problem(
                (option,),
                f"family {draft.family.plugin.name!r} does not honour this option, so it would "
                "have no effect. Leave it out, or use a family that does",
            )


def _training_problems(draft: Draft, name: str, role: RoleConfig) -> Iterator[Problem]:
    """Options that do not go with being trained, or with being frozen."""
    trainable = draft.roles[name].spec.trainable
    # Where the method is not known, neither is what it trains.
    known = bool(draft.needs)
    if role.lora and not trainable and role.init_from is None and known:
        yield Problem(
            ("lora",),
            f"role {name!r} is frozen, so its adapters would stay at B A = 0, where they "
            "change nothing. Remove lora, or name trained ones with init_from",
        )
    frozen_by_file = role.trainable is False or "training" not in draft.known
    if role.optimizer and not trainable and (known or frozen_by_file):
        yield Problem(
            ("optimizer",),
            f"role {name!r} is frozen, so its optimizer would never step. Remove these keys",
        )
    if role.offload and trainable:
        yield Problem(
            ("offload",),
            f"true, but {name!r} is trained: gradients and moments stay beside the weights. "
            "Use fsdp: {cpu_offload: true}, which moves them together",
        )
    base = draft.roles.get(role.base or "")
    if base is not None and base.spec.trainable:
        yield Problem(
            ("base",),
            f"{role.base!r} is trained, so its weights would move under the adapters. "
            "Name a frozen role, such as the teacher",
        )


def _key_problems(
    name: str, roles: Mapping[str, RoleConfig], *, discriminator: bool
) -> Iterator[Problem]:
    """Options of one role that do not go together, or not with the roles beside it.

    Args:
        discriminator: whether it is one for its method.
    """
    role = roles[name]
    if role.heads is not None:
        yield from _head_problems(name, role, role.heads, roles)
        return
    if role.base is not None:
        yield from _base_problems(name, role, roles)
    elif role.path is None and not discriminator:  # which lacks heads, and has that problem
        yield Problem(
            ("path",),
            "missing: a folder (begin it with ./ or ../ or /) or a hub id (owner/name) states what "
            "the model is. Write it, or base: <role> to train lora beside another role's weights",
        )
    if role.offload:
        yield from _offload_problems(name, role, roles)


def _head_problems(
    name: str, role: RoleConfig, heads: DiscriminatorSpec, roles: Mapping[str, RoleConfig]
) -> Iterator[Problem]:
    on = roles.get(heads.on)
    if on is None or on.heads is not None:
        others = ", ".join(n for n, other in roles.items() if other.heads is None) or "none"
        yield Problem(
            ("heads", "on"),
            f"{heads.on!r} must be a role of this file with a model of its own (there are: "
            f"{others}): the heads read its features",
        )
    elif on.compile is not None:
        yield Problem(
            ("heads", "on"),
            f"{heads.on!r} has compile, and each call that gives features would compile its "
            f"blocks anew. Leave compile out under models.{heads.on}",
        )
    if role.precision not in (None, "fp32"):
        yield Problem(
            ("precision",),
            f"{role.precision} of heads; they are small, and compute in fp32 whatever the role "
            "that they are on does. Leave it out",
        )
    stated = [*(["path"] if role.path is not None else []), *role.options_set()]
    for key in stated:
        # precision and offload have rules of their own.
        if key not in ("heads", "fsdp", "precision", "offload"):
            yield Problem(
                (key,),
                f"has no place beside heads: {name!r} is small networks on the features of "
                f"{heads.on!r}, and that role states what the model is. Leave it out",
            )


def _base_problems(
    name: str, role: RoleConfig, roles: Mapping[str, RoleConfig]
) -> Iterator[Problem]:
    base = roles.get(role.base or "")
    if base is None or role.base == name:
        others = ", ".join(other for other in roles if other != name) or "none"
        yield Problem(
            ("base",), f"{role.base!r} must be another role of this file (there are: {others})"
        )
        return
    if base.base is not None or base.lora is not None:
        yield Problem(
            ("base",),
            f"{role.base!r} trains adapters itself; a base is a role with plain weights. Name the "
            "role whose weights these adapters are beside",
        )
    if base.init_from is not None:
        yield Problem(
            ("base",),
            f"{role.base!r} starts from {base.init_from.path}, but an export of adapters names "
            f"the weights of its path. Export those first, and name them as {role.base}.path",
        )
    if role.lora is None:
        yield Problem(
            ("base",),
            "a role beside another's weights needs lora: {rank: ...}, or nothing of it is its own. "
            "For a plain copy write the same path instead",
        )
    if missing := [e for e in role.experts if base.experts and e not in base.experts]:
        yield Problem(
            ("experts",),
            f"{', '.join(missing)}: {role.base!r} has {', '.join(base.experts)} alone, and these "
            f"adapters are beside its weights. Name one of these, or both under models.{role.base}",
        )
    for key in ("path", *FROM_BASE):
        if getattr(role, key) is not None:
            yield Problem(
                (key,),
                f"with base: {role.base} it is that role's, as the weights are held once. Leave "
                f"it out, or write it under models.{role.base}",
            )


def _offload_problems(
    name: str, role: RoleConfig, roles: Mapping[str, RoleConfig]
) -> Iterator[Problem]:
    sharing = [role.base, *(n for n, other in roles.items() if other.base == name)]
    if any(sharing):
        yield Problem(
            ("offload",),
            f"true, but {' and '.join(filter(None, sharing))} uses the same weights, which would "
            "be moved away under it. Leave it out",
        )
