"""Reading a run file: plain values, and the line of each.

YAML 1.2 scalars (``1e-3`` is a float, ``no`` is a word), which PyYAML's own 1.1 rules get wrong
for run files. Duplicate keys are problems: the second would silently win.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from attrs import define, field, frozen

Path_ = tuple[str, ...]
"""Keys from the top of the file: ``("models", "student", "path")``."""


@frozen
class Fault:
    """One thing that is wrong, and where."""

    file: Path
    line: int
    path: Path_
    message: str

    def __str__(self) -> str:
        where = ".".join(self.path)
        return f"{self.file.name}:{self.line}: {where + ': ' if where else ''}{self.message}"


@define
class Source:
    """A parsed file: ``values`` as plain Python, ``lines`` by key path."""

    file: Path
    values: Any
    lines: dict[Path_, int] = field(factory=dict)
    problems: list[Fault] = field(factory=list)

    def line(self, path: Path_) -> int:
        """Line of ``path``, or of the nearest key above it that is in the file."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def problem(self, path: Path_, message: str) -> Fault:
        return Fault(self.file, self.line(path), path, message)


_CORE = "tag:yaml.org,2002:"
_TAGS = frozenset({"map", "seq", "str", "int", "float", "bool", "null", "merge"})


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own way)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
    )
# PyYAML's int constructor takes a leading zero for octal; a run file means the decimal number.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


RUN_FILE = "--config takes a run file: a mapping of sections (recipe:, models:, training: ...)"
MODELS_FILE = "--models_json takes a JSON object: role -> keys of models.<role>"


def read_source(file: Path, *, expected: str = RUN_FILE) -> Source:
    """Parse ``file``. What is wrong with it as YAML is in ``problems``; nothing is raised.

    Args:
        expected: what the file should be, for messages.
    """
    source = Source(file=file, values=None)

    def problem(message: str, line: int = 1) -> Source:
        source.problems.append(Fault(file, line, (), message))
        return source

    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return problem(f"there is no file {file}; {expected}")
    except (OSError, UnicodeDecodeError) as error:
        return problem(f"cannot be read as UTF-8 text: {error}; {expected}")
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return problem(f"holds the unprintable character #x{error.character:04x}", line)
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            kind = type(node).__name__.removesuffix("Node").lower()
            return problem(f"the file is {'empty' if node is None else f'a {kind}'}; {expected}")
        source.values = _plain(loader, node, (), source)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = str(error.problem or error)
        hint = " (indent with spaces)" if r"'\t'" in said else ""
        return problem(f"not valid YAML: {said}{hint}", mark.line + 1 if mark else 1)
    except RecursionError:
        return problem("an alias (*name) stands inside the very thing that it names")
    finally:
        loader.dispose()
    return source


def _plain(loader: _Loader, node: yaml.Node, path: Path_, source: Source) -> Any:
    source.lines.setdefault(path, node.start_mark.line + 1)
    if node.tag.removeprefix(_CORE) not in _TAGS:
        source.problems.append(
            source.problem(path, f"the tag {node.tag!r} is not read: a run file holds plain values")
        )
        return None
    if isinstance(node, yaml.MappingNode):
        _note_duplicates(node, path, source)
        loader.flatten_mapping(node)
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node, deep=True))
            source.lines[(*path, key)] = key_node.start_mark.line + 1
            result[key] = _plain(loader, value_node, (*path, key), source)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, (*path, str(i)), source) for i, item in enumerate(node.value)]
    return loader.construct_object(node)


def _note_duplicates(node: yaml.MappingNode, path: Path_, source: Source) -> None:
    seen: dict[str, int] = {}
    for key_node, _ in _own_keys(node):
        line = key_node.start_mark.line + 1
        if key_node.value in seen:
            source.problems.append(
                Fault(
                    source.file,
                    line,
                    (*path, key_node.value),
                    f"written twice (first in line {seen[key_node.value]}); YAML would silently "
                    "take the second. Remove one",
                )
            )
        seen.setdefault(key_node.value, line)


def _own_keys(node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    return (pair for pair in node.value if pair[0].tag != "tag:yaml.org,2002:merge")
