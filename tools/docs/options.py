"""The option reference: every key of every section, read off the frozen config classes.

What a key means is in the ``Attributes:`` of its class's docstring, its type and default are the
field's, and what is refused is what its validators raise. Nothing is written twice, so the pages
cannot go stale.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import attrs
from attrs import frozen
from distill_protocols.validators import NumberRule

from docs.yaml_text import yaml_text


@frozen(kw_only=True)
class Option:
    """One key.

    Attributes:
        name: the key.
        kind: its type in words.
        default: as YAML, or None where the key must be written.
        text: what it means, in markdown.
        rules: what it must be, and why; one sentence each.
        nested: config classes that its value may be of.
        is_by_name: whether it holds sections by names that the writer gives them.
    """

    name: str
    kind: str
    default: str | None
    text: str
    rules: tuple[str, ...]
    nested: tuple[type, ...]
    is_by_name: bool = False


@cache
def read_options(config: type) -> tuple[Option, ...]:
    """Read the keys of a config class, in the order of its fields.

    Raises:
        ValueError: a field is not described in the ``Attributes:`` of its class or of a base.
    """
    texts = read_attributes(config)
    hints = get_type_hints(config)
    options = []
    for field in attrs.fields(config):
        if not field.init:
            continue
        if field.name not in texts:
            raise ValueError(
                f"{config.__module__}.{config.__name__}.{field.name} is in no Attributes: "
                "paragraph, and the option reference is made of these. Describe it there"
            )
        options.append(
            Option(
                name=field.name,
                kind=describe_type(hints[field.name]),
                default=describe_default(field),
                text=to_markdown(texts[field.name]),
                rules=tuple(dict.fromkeys(_rules(field.validator))),
                nested=tuple(_nested(hints[field.name])),
                is_by_name=get_origin(hints[field.name]) in (dict, Mapping),
            )
        )
    return tuple(options)


_ENTRY = re.compile(r"^((?:\w+(?:, )?)+): ?(.*)$")


def read_attributes(config: type) -> dict[str, str]:
    """Read name -> text off the ``Attributes:`` of a class and its bases; the class's own win."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        names: tuple[str, ...] = ()
        for line in _attribute_lines(inspect.cleandoc(cls.__dict__.get("__doc__") or "")):
            if (match := _ENTRY.match(line)) and not line.startswith(" "):
                names = tuple(match[1].split(", "))
                found.update(dict.fromkeys(names, match[2]))
            else:
                found.update({name: f"{found[name]} {line.strip()}".strip() for name in names})
    return found


def _attribute_lines(doc: str) -> Iterator[str]:
    inside = False
    for line in doc.splitlines():
        if line == "Attributes:":
            inside = True
        elif inside and line and not line.startswith(" "):
            inside = False
        elif inside and line.strip():
            yield line.removeprefix("    ")


def read_owner(config: type, name: str) -> type:
    """Return the class, ``config`` or a base of it, that declares a field."""
    owners = [cls for cls in config.__mro__ if name in inspect.get_annotations(cls)]
    return owners[-1]


def summary(config: type) -> str:
    """Return what stands in the docstring of a class before its ``Attributes:``, in markdown."""
    doc = inspect.cleandoc(config.__doc__ or "")
    return to_markdown(doc.split("Attributes:")[0].strip())


def to_markdown(text: str) -> str:
    """Turn double backticks into single ones, and keep ``<`` and ``*`` from being markup."""
    parts = re.split(r"(``.*?``)", text)
    return "".join(f"`{part[2:-2]}`" if part.startswith("``") else _escape(part) for part in parts)


def _escape(text: str) -> str:
    """Keep ``<`` and ``*`` from being markup, and call Python's None what YAML does."""
    return re.sub(r"([<*])", r"\\\1", re.sub(r"\bNone\b", "null", text))


def describe_type(hint: Any) -> str:
    """Say in words what a key's value may be."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return "any value"
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(arg) for arg in args)
    if origin is Literal:
        return " or ".join(f"`{yaml_text(arg)}`" for arg in args)
    if origin is tuple and args[-1] is Ellipsis:
        return f"list of {describe_type(args[0])}"
    if origin is tuple:
        return f"list of {len(args)}: {', '.join(describe_type(arg) for arg in args)}"
    if origin in (dict, Mapping):
        return f"mapping of names to {describe_type(args[1])}"
    if attrs.has(origin or hint):
        return "mapping"
    return {
        str: "text", int: "whole number", float: "number", bool: "true or false",
        type(None): "null",
    }[hint]  # fmt: skip


def describe_default(field: attrs.Attribute[Any]) -> str | None:
    """Return a field's default as YAML; None: the key must be written."""
    value = field.default
    if value is attrs.NOTHING:
        return None
    if isinstance(value, _Factory):
        try:
            value = value.factory()
        except TypeError:  # of a nested section that has keys without a default
            return None
    return yaml_text(_plain(value))


def _plain(value: Any) -> Any:
    """Turn config objects into mappings of what differs from their own defaults."""
    if attrs.has(type(value)):
        return {
            f.name: _plain(v)
            for f in attrs.fields(type(value))
            if (v := getattr(value, f.name)) != f.default and not isinstance(f.default, _Factory)
        }
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


_Factory: Any = attrs.Factory  # a function for a type checker, and a class at run time


def _nested(hint: Any) -> Iterator[type]:
    if attrs.has(get_origin(hint) or hint):
        yield hint
    for arg in get_args(hint):
        if arg is not Ellipsis and not isinstance(arg, str):
            yield from _nested(arg)


def _rules(validator: Any) -> Iterator[str]:
    """Say what a validator refuses: its rule, or the messages that it raises."""
    if validator is None:
        return
    if isinstance(validator, NumberRule):
        yield f"must be {validator.rule}: {validator.why}"
    elif isinstance(validator, list | tuple):
        for one in validator:
            yield from _rules(one)
    elif hasattr(validator, "_validators"):  # attrs.validators.and_
        yield from _rules(validator._validators)
    elif hasattr(validator, "validator"):  # attrs.validators.optional
        yield from _rules(validator.validator)
    elif hasattr(validator, "options") or inspect.isroutine(validator) is False:
        yield from _attrs_rule(validator)
    else:
        yield from (message for message in raised_messages(validator))


def _attrs_rule(validator: Any) -> Iterator[str]:
    """Say what a plain validator of attrs refuses; the type names the options of ``in_``."""
    if hasattr(validator, "bound"):
        yield f"must be {validator.compare_op} {validator.bound}"


def raised_messages(function: Callable[..., Any]) -> Iterator[str]:
    """Yield the messages of the errors that a function raises by itself, with ``...`` for each
    value that is put in."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            text = message_text(node.exc.args[0])
            if text and set(text) - set(". …"):
                yield text


def message_text(node: ast.expr) -> str:
    """Return the text of a string expression, with an ellipsis for each value that is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
        return "".join(str(part) for part in parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return message_text(node.left) + message_text(node.right)
    return "…"
