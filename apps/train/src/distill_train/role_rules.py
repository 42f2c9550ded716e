"""What of one role's keys does not go together, or not with the roles beside it. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from distill_protocols import Problem

from distill_train.schema import RoleConfig


def key_problems(
    name: str, roles: Mapping[str, RoleConfig], *, discriminator: bool = False
) -> Iterator[Problem]:
    """Rules over ``models.<name>`` that need no family and no method.

    Args:
        discriminator: what the role is for its method.
    """
    role = roles[name]
    if role.heads is not None:
        yield from _head_problems(name, role, roles)
        return
    if role.base is not None:
        yield from _base_problems(name, role, roles)
    elif role.path is None and not discriminator:  # which lacks heads, and has that problem
        yield Problem(
            ("path",),
            "missing: a folder (begin it with ./ or ../ or /) or a hub id (owner/name) says what "
            "the model is. Write it, or base: <role> to train lora beside another role's weights",
        )
    if role.offload:
        yield from _offload_problems(name, role, roles)


def _head_problems(
    name: str, role: RoleConfig, roles: Mapping[str, RoleConfig]
) -> Iterator[Problem]:
    assert role.heads is not None
    on = roles.get(role.heads.on)
    if on is None or on.heads is not None:
        others = ", ".join(n for n, other in roles.items() if other.heads is None) or "none"
        yield Problem(
            ("heads", "on"),
            f"{role.heads.on!r} must be a role of this file with a model of its own (there are: "
            f"{others}): the heads read its features",
        )
    elif on.compile is not None:
        yield Problem(
            ("heads", "on"),
            f"{role.heads.on!r} has compile, and each call that gives features would compile its "
            f"blocks anew. Leave compile out under models.{role.heads.on}",
        )
    given = {
        "path": role.path,
        "base": role.base,
        "lora": role.lora,
        "compile": role.compile,
        "activation_checkpointing": role.activation_checkpointing or None,
    }
    if role.precision not in (None, "fp32"):
        yield Problem(
            ("precision",),
            f"{role.precision} of heads; they are small, and compute in fp32 whatever the role "
            "that they are on does. Leave it out",
        )
    for key, value in given.items():
        if value is not None:
            yield Problem(
                (key,),
                f"has no place beside heads: {name!r} is small networks on the features of "
                f"{role.heads.on!r}, and that role says what the model is. Leave it out",
            )


def _base_problems(
    name: str, role: RoleConfig, roles: Mapping[str, RoleConfig]
) -> Iterator[Problem]:
    base = roles.get(role.base or "")
    if base is None or role.base == name:
        others = ", ".join(other for other in roles if other != name) or "none"
        yield Problem(
            "base", f"{role.base!r} must be another role of this file (there are: {others})"
        )
        return
    if base.base is not None or base.lora is not None:
        yield Problem(
            ("base",),
            f"{role.base!r} trains adapters itself; a base is a role with plain weights. Name the "
            "role that they stand beside",
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
    same = {
        "path": role.path,
        "precision": role.precision,
        "fsdp": role.fsdp,
    }
    for key, value in same.items():
        if value is not None:
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
