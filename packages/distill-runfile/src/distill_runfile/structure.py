"""Plain values into frozen config objects, with every problem of a section at once. No torch.

A field with ``metadata["plugins"]``, the name of an entry-point group, is a mapping of names of
plugins to their options, or a list of names; each becomes the plugin's ``config_class``.

Leaves are taken strictly (7 is no string, 2.7 no int, "no" no bool). Classes are walked field by
field, so that one wrong key does not hide the next; then every validator of every field runs by
itself, which is why config classes keep all their rules in validators.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import attrs
from attrs import frozen
from distill_protocols import PluginError
from distill_runtime import load_plugin

from distill_runfile.paths import resolve_path
from distill_runfile.problems import KeyPath

Report = Callable[[KeyPath, str], None]
ConfigT = TypeVar("ConfigT")

_BROKEN: Any = object()
"""Stands for a value that has a problem already."""


@frozen(kw_only=True)
class Structuring:
    """How a section is read.

    Attributes:
        report: takes each problem: its path and message.
        folder_of: path of a key -> folder that relative paths written there begin from (fields
            with ``metadata["path"]``).
        complete: finishes each value of a field before the rules of its class are applied; a
            ValueError is a problem of that value.
    """

    report: Report
    folder_of: Callable[[KeyPath], Path] = lambda path: Path()
    complete: Callable[[Any], Any] = lambda value: value


_SCALARS: Mapping[type, tuple[type, ...]] = {
    str: (str,), int: (int,), float: (float, int), bool: (bool,),
}  # fmt: skip
"""By type of a field, the types of values that it takes; a bool is no number."""


def to_plain(value: object) -> Any:
    """Turn a config object into mappings, lists and scalars, for the run's record."""
    if attrs.has(type(value)):
        return {f.name: to_plain(getattr(value, f.name)) for f in attrs.fields(type(value))}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def structure(
    kind: type[ConfigT], value: object, path: KeyPath, how: Structuring
) -> ConfigT | None:
    """Read ``value``, which is written at ``path``, as a ``kind``, an attrs class.

    None: something is wrong with it, and was reported. Fields may have any type made of scalars,
    Literals, dicts, tuples and attrs classes.
    """
    result = _structure(kind, value, path, how)
    return None if result is _BROKEN else result


def _structure(kind: Any, value: Any, path: KeyPath, how: Structuring) -> Any:
    if kind is Any:
        return value
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _structure_union(kind, value, path, how)
    if attrs.has(origin or kind):
        return _structure_class(kind, value, path, how)
    if origin in (dict, Mapping):
        return _structure_mapping(kind, value, path, how)
    if origin is tuple:
        return _structure_tuple(kind, value, path, how)
    if origin is Literal:
        options = get_args(kind)
        if value in options and type(value) in {type(option) for option in options}:
            return value
        near = difflib.get_close_matches(str(value), [str(option) for option in options], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        how.report(path, f"{value!r} must be one of {', '.join(map(repr, options))}{hint}")
        return _BROKEN
    if kind not in _SCALARS:
        raise TypeError(f"{'.'.join(path)}: fields of config classes cannot be {kind}")
    if isinstance(value, _SCALARS[kind]) and (kind is bool or not isinstance(value, bool)):
        return kind(value)
    how.report(path, f"{value!r} is {_type_name(value)}, but must be {_kind_name(kind)}")
    return _BROKEN


def _structure_union(kind: Any, value: Any, path: KeyPath, how: Structuring) -> Any:
    options = get_args(kind)
    if value is None and type(None) in options:
        return None
    rest = [option for option in options if option is not type(None)]
    classes = [option for option in rest if attrs.has(get_origin(option) or option)]
    if isinstance(value, dict) and len(classes) == 1:
        rest = classes  # nothing else is written as a mapping, so its own problems are meant
    if len(rest) == 1:
        return _structure(rest[0], value, path, how)
    for option in rest:
        problems: list[str] = []
        silent = attrs.evolve(how, report=lambda _, message, p=problems: p.append(message))
        result = _structure(option, value, path, silent)
        if not problems:
            return result
    kinds = ", ".join(_kind_name(option) for option in rest)
    how.report(path, f"{value!r} must be one of: {kinds}")
    return _BROKEN


def _structure_mapping(kind: Any, value: Any, path: KeyPath, how: Structuring) -> Any:
    if not isinstance(value, dict):
        how.report(path, f"{value!r} is {_type_name(value)}, but must be a mapping")
        return _BROKEN
    item = get_args(kind)[1]
    result = {k: _structure(item, v, (*path, k), how) for k, v in value.items()}
    return _BROKEN if any(v is _BROKEN for v in result.values()) else result


def _structure_tuple(kind: Any, value: Any, path: KeyPath, how: Structuring) -> Any:
    if not isinstance(value, list | tuple):
        how.report(path, f"{value!r} is {_type_name(value)}, but must be a list")
        return _BROKEN
    args = get_args(kind)
    if args[-1] is not Ellipsis and len(args) != len(value):
        how.report(path, f"{value!r} has {len(value)} items, but must have {len(args)}")
        return _BROKEN
    kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
    items = [
        _structure(item, v, (*path, str(i)), how)
        for i, (item, v) in enumerate(zip(kinds, value, strict=True))
    ]
    return _BROKEN if any(item is _BROKEN for item in items) else tuple(items)


def _structure_plugins(group: Any, value: Any, path: KeyPath, how: Structuring) -> Any:
    """Read the options of plugins of ``group``, by their names; None stays None."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        written = [(name, {}, (*path, str(i))) for i, name in enumerate(value)]
    elif isinstance(value, dict):
        written = [(name, options, (*path, str(name))) for name, options in value.items()]
    else:
        how.report(path, f"{value!r} must be a list of names, or a mapping of names to options")
        return _BROKEN
    result: dict[str, Any] = {}
    for name, options, where in written:
        if not isinstance(name, str):
            how.report(where, f"{name!r} is {_type_name(name)}, but must be a name")
            result[repr(name)] = _BROKEN
            continue
        if name in result:
            how.report(where, f"{name!r} stands twice; name it once")
            result[name] = _BROKEN
            continue
        try:
            config_class = load_plugin(group, name).config_class
        except PluginError as error:
            how.report(where, str(error))
            result[name] = _BROKEN
        else:
            result[name] = _structure(config_class, options, where, how)
    return _BROKEN if any(config is _BROKEN for config in result.values()) else result


def _structure_class(cls: Any, value: Any, path: KeyPath, how: Structuring) -> Any:
    if value is None:
        value = {}
    if not isinstance(value, dict):
        how.report(path, f"{value!r} is {_type_name(value)}, but must be a mapping of keys")
        return _BROKEN
    attrs.resolve_types(cls)
    fields = {f.name: f for f in attrs.fields(cls) if f.init}
    problems = 0

    def note(where: KeyPath, message: str) -> None:
        nonlocal problems
        problems += 1
        how.report(where, message)

    inner = attrs.evolve(how, report=note)
    for key in value:
        if key not in fields:
            note((*path, key), unknown_key(key, tuple(fields), owner=".".join(path)))
    got: dict[str, object] = {}
    for name, f in fields.items():
        where = (*path, name)
        if name in value:
            if "plugins" in f.metadata:
                item = _structure_plugins(f.metadata["plugins"], value[name], where, inner)
            else:
                item = _structure(f.type, value[name], where, inner)
            if "path" in f.metadata:
                try:
                    item = _absolute(item, how.folder_of(where), keep=f.metadata["path"])
                except ValueError as error:
                    note(where, str(error))
                    item = _BROKEN
        elif f.default is attrs.NOTHING:
            note(where, f"missing; {'.'.join(path)} needs it")
            continue
        else:
            item = f.default.factory() if isinstance(f.default, attrs.Factory) else f.default  # type: ignore[arg-type]
        if item is _BROKEN:
            continue
        try:
            got[name] = how.complete(item)
        except ValueError as error:
            note(where, str(error))
    _run_validators(cls, fields, got, path, note)
    return cls(**got) if not problems else _BROKEN


def _run_validators(
    cls: Any,
    fields: Mapping[str, attrs.Attribute[Any]],
    got: Mapping[str, object],
    path: KeyPath,
    note: Report,
) -> None:
    # A partial instance: rules across fields read it, and may meet a field that has a problem.
    instance = cls.__new__(cls)
    for name, value in got.items():
        object.__setattr__(instance, name, value)
    for name, value in got.items():
        validator = fields[name].validator
        if validator is None:
            continue
        try:
            validator(instance, fields[name], value)
        except AttributeError:
            # The rule reads a field whose own problem is reported already.
            if len(got) == len(fields):
                raise
        except (ValueError, TypeError) as error:
            note((*path, name), str(error.args[0] if error.args else error))


def _absolute(item: Any, base: Path, *, keep: tuple[str, ...]) -> Any:
    """Return a path, or each of several, as absolute ones; anything else (nothing was given) as it
    is."""
    if isinstance(item, tuple):
        return tuple(_absolute(one, base, keep=keep) for one in item)
    return resolve_path(item, base, keep=keep) if isinstance(item, str) else item


def unknown_key(key: str, known: tuple[str, ...], *, owner: str) -> str:
    """Return the message for a key that nobody reads."""
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown key{hint} ({owner or 'a run file'} accepts: {', '.join(known)})"


def _type_name(value: Any) -> str:
    names = {str: "a string", bool: "a boolean", int: "an integer", float: "a float",
             dict: "a mapping", list: "a list", type(None): "empty"}  # fmt: skip
    return names.get(type(value), type(value).__name__)


def _kind_name(kind: Any) -> str:
    names = {str: "a string", bool: "true or false", int: "an integer", float: "a number"}
    if get_origin(kind) is tuple:
        return "a list"
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if attrs.has(kind):
        return f"a mapping with {', '.join(f.name for f in attrs.fields(kind))}"
    return names.get(kind, str(kind))
