"""Reading files: plain values, and the line of each. No torch.

YAML files are read with YAML 1.2 scalars (``1e-3`` is a float, ``no`` is a word), which PyYAML's
own 1.1 rules get wrong for run files; JSON files are read as JSON. In both, duplicate keys are
problems: the second would silently win.

A file may be hostile: bytes, values (each alias counts as what it names), levels and digits are
limited, and of PyYAML only the parser is used: scalars, keys and merges (``<<``) are read here.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from attrs import define, field
from distill_runtime import UnreadableFileError, read_bytes
from distill_runtime.json_files import MAX_DEPTH, parse_float, parse_integer, refuse_constant

from distill_runfile.paths import written_path_problem
from distill_runfile.problems import KeyPath, LocatedProblem

MAX_BYTES = 1 << 20
"""A hundred times what a long run file has."""
MAX_VALUES = 20_000
"""More values than any file needs; aliases of aliases reach it at once."""

RUN_FILE = "--config takes a run file: a mapping of sections (recipe:, models:, training: ...)"
MODELS_FILE = "--models_json takes a JSON object: role -> keys of models.<role>"
BASE_FILE = "run_file takes a run file, whose sections are those of this file where it has none"
PIPELINE_FILE = "pipeline_config_path takes a YAML or JSON file: the keys of pipeline_config"


@define
class Source:
    """A parsed file: ``values`` as plain Python (None: not readable), ``lines`` by key path.

    Attributes:
        unreadable: paths of values that have a problem already, and are None in ``values``.
        count: of the values that were read, aliases as often as they stand.
    """

    file: Path
    values: dict[str, object] | None
    lines: dict[KeyPath, int] = field(factory=dict)
    problems: list[LocatedProblem] = field(factory=list)
    unreadable: set[KeyPath] = field(factory=set)
    count: int = 0

    def line(self, path: KeyPath) -> int:
        """Line of ``path``, or of the nearest key above it that is in the file."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def problem(self, path: KeyPath, message: str) -> LocatedProblem:
        """Locate a problem by its path."""
        return LocatedProblem(self.file, self.line(path), path, message)


def read_source(
    file: Path, *, expected: str = RUN_FILE, format: Literal["yaml", "json"] | None = None
) -> Source:
    """Parse ``file``. What is wrong with it as YAML or JSON is in ``problems``; nothing is raised.

    Args:
        expected: what the file should be, for messages.
        format: None: JSON where the file's name ends in ``.json``, else YAML.
    """
    source = Source(file=file, values=None)
    try:
        if not file.exists():
            return _unreadable(source, f"there is no file {file}; {expected}")
        text = str(read_bytes(file, max_bytes=MAX_BYTES), "utf-8")
    except (OSError, UnreadableFileError) as error:
        return _unreadable(source, f"{error}; {expected}")
    except ValueError as error:  # no UTF-8, or a NUL in the name
        return _unreadable(source, f"cannot be read as UTF-8 text: {error}; {expected}")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if format == "json" or (format is None and file.suffix == ".json"):
        value = _parse_json(text, source)
    else:
        value = _parse_yaml(text, source)
    if isinstance(value, dict):
        source.values = value
    elif not source.problems:
        names = {list: "a sequence", type(None): "empty"}
        kind = names.get(type(value), f"a scalar ({value!r})")
        return _unreadable(source, f"the file is {kind}; {expected}")
    return source


def _unreadable(source: Source, message: str, line: int = 1) -> Source:
    source.problems.append(LocatedProblem(source.file, line, (), message))
    return source


def _note_value(source: Source, path: KeyPath, line: int) -> None:
    source.lines.setdefault(path, line)
    source.count += 1
    if source.count > MAX_VALUES:
        raise _ExcessError(
            f"holds more than {MAX_VALUES} values (each alias counts as what it names)", line
        )
    if len(path) > MAX_DEPTH:
        raise _ExcessError(_TOO_DEEP, line)


class _ExcessError(Exception):
    """A file holds more than is read."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.line = line


_TOO_DEEP = f"is nested too deeply to be read (more than {MAX_DEPTH} levels)"
_SURROGATE = re.compile("[\ud800-\udfff]")


def _as_text(value: str) -> str:
    """Join escaped UTF-16 pairs (``"\\ud83e\\udd8a"``), which YAML reads as two halves.

    Raises:
        ValueError: half of a pair stands alone, which no file and no terminal can show; or a NUL,
            which ends a file's name for the system.
    """
    if "\0" in value:
        raise ValueError(f"{value!a} holds a NUL character, which neither names nor prompts have")
    if value.isascii() or not _SURROGATE.search(value):
        return value
    try:
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise ValueError(f"{value!a} holds half of a UTF-16 pair, which is no text") from None


# -- YAML ---------------------------------------------------------------------------------------

_CORE = "tag:yaml.org,2002:"
_MERGE = "merge"


def _as_integer(text: str) -> int:
    if not re.fullmatch(_PATTERNS["int"], text):
        raise ValueError(f"{text[:40]!r} is no integer")
    return parse_integer(text)  # a leading zero is no octal, as in YAML 1.1


def _as_float(text: str) -> float:
    if not re.fullmatch(_PATTERNS["float"], text):
        raise ValueError(f"{text[:40]!r} is no number")
    if text.lower().endswith(("inf", "nan")):
        return float(text.replace(".", ""))
    return parse_float(text)


def _as_boolean(text: str) -> bool:
    if not re.fullmatch(_PATTERNS["bool"], text):
        raise ValueError(f"{text[:40]!r} is neither true nor false")
    return text.lower() == "true"


def _as_null(text: str) -> None:
    if not re.fullmatch(_PATTERNS["null"], text):
        raise ValueError(f"{text[:40]!r} is not null")


_PATTERNS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+",
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN)"
    ),
    _MERGE: r"<<",
}
_SCALARS: dict[str, Callable[[str], Any]] = {
    "str": _as_text,
    "int": _as_integer,
    "float": _as_float,
    "bool": _as_boolean,
    "null": _as_null,
}


class _Loader(yaml.SafeLoader):
    """PyYAML's parser and composer, which stop at the limits. Nothing is constructed by it."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (as PyYAML declares it)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = 0
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Count nodes and levels."""
        self._nodes += 1
        self._depth += 1
        line = self.peek_event().start_mark.line + 1
        if self._nodes > 2 * MAX_VALUES:  # keys are nodes too
            raise _ExcessError(f"holds more than {MAX_VALUES} values", line)
        if self._depth > MAX_DEPTH:
            raise _ExcessError(_TOO_DEEP, line)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """Stop at once: the scanner looks ahead, at a cost that is quadratic in the levels."""
        if self.flow_level > MAX_DEPTH:
            raise _ExcessError(_TOO_DEEP, self.line + 1)
        super().fetch_flow_collection_start(TokenClass)


for _tag, _first in (
    ("null", ["~", "n", "N", ""]),
    ("bool", list("tTfF")),
    ("int", list("-+0123456789")),
    ("float", list("-+.0123456789")),
    (_MERGE, ["<"]),
):
    _Loader.add_implicit_resolver(f"{_CORE}{_tag}", re.compile(f"^(?:{_PATTERNS[_tag]})$"), _first)


def _parse_yaml(text: str, source: Source) -> Any:
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return _unreadable(source, f"holds the unprintable character #x{error.character:04x}", line)
    try:
        node = loader.get_single_node()
        return None if node is None else _YamlReader(source).value(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = str(error.problem or error)
        hint = " (indent with spaces)" if r"'\t'" in reason else ""
        _unreadable(source, f"not valid YAML: {reason}{hint}", mark.line + 1 if mark else 1)
    except (ValueError, OverflowError) as error:  # the scanner's: an escape of no character
        _unreadable(source, f"not valid YAML: {error}", loader.line + 1)
    except _ExcessError as error:
        _unreadable(source, str(error), error.line)
    finally:
        loader.dispose()
    return None


class _YamlReader:
    """Turns nodes into plain values, and notes their lines and problems."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._open: set[int] = set()
        """Nodes that are being read: one that stands in itself has no value."""

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        line = node.start_mark.line + 1
        _note_value(self._source, path, line)
        if not self._has_known_tag(node, path):
            return None
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if id(node) in self._open:
            self._report(node, path, "an alias (*name) stands inside the very thing that it names")
            return None
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            return [self.value(item, (*path, str(i))) for i, item in enumerate(node.value)]
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, object]:
        result: dict[str, object] = {}
        merges = [value for key, value in node.value if key.tag == _CORE + _MERGE]
        for merged in reversed([one for value in merges for one in self._merged(value, path)]):
            result |= self.value(merged, path) or {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _CORE + _MERGE:
                continue
            key = self._key(key_node, path)
            if key is None:
                continue
            line = key_node.start_mark.line + 1
            if key in lines:
                self._source.problems.append(
                    _duplicate(self._source, (*path, key), line, lines[key])
                )
            lines.setdefault(key, line)
            self._source.lines[(*path, key)] = line
            result[key] = self.value(value_node, (*path, key))
        return result

    def _merged(self, node: yaml.Node, path: KeyPath) -> list[yaml.Node]:
        """Return the mappings behind ``<<``; of equal keys the first one's counts."""
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if all(isinstance(one, yaml.MappingNode) for one in nodes):
            return nodes
        self._report(node, path, "<<: takes a mapping, or a list of mappings")
        return []

    def _key(self, node: yaml.Node, path: KeyPath) -> str | None:
        """Return a key as it is written."""
        if not isinstance(node, yaml.ScalarNode):
            self._report(node, path, "a key must be a word, and no list or mapping")
            return None
        if not self._has_known_tag(node, path):
            return None
        try:
            return _as_text(node.value)
        except ValueError as error:
            self._report(node, path, f"cannot be read as key: {error}")
            return None

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        kind = node.tag.removeprefix(_CORE)
        try:
            return _SCALARS[kind](node.value)
        except ValueError as error:  # such as ``!!int abc`` or a number of 6000 digits
            self._report(node, path, f"cannot be read as {kind}: {error}")
            return None

    def _has_known_tag(self, node: yaml.Node, path: KeyPath) -> bool:
        kinds = {yaml.MappingNode: ("map",), yaml.SequenceNode: ("seq",)}
        known = kinds.get(type(node), tuple(_SCALARS))
        if node.tag in [_CORE + kind for kind in known]:
            return True
        self._report(
            node, path, f"the tag {node.tag!r} is not read here: a run file holds plain values"
        )
        return False

    def _report(self, node: yaml.Node, path: KeyPath, message: str) -> None:
        line = node.start_mark.line + 1
        self._source.problems.append(LocatedProblem(self._source.file, line, path, message))
        self._source.unreadable.add(path)


def _duplicate(source: Source, path: KeyPath, line: int, first: int) -> LocatedProblem:
    message = (
        f"written twice (first in line {first}); the second would silently be taken. Remove one"
    )
    return LocatedProblem(source.file, line, path, message)


# -- JSON ---------------------------------------------------------------------------------------


def _parse_json(text: str, source: Source) -> Any:
    reader = _JsonReader(text, source)
    try:
        value, end = reader.value((), reader.skip_space(0))
        if (end := reader.skip_space(end)) < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        return value
    except json.JSONDecodeError as error:
        _unreadable(source, f"not valid JSON: {error.msg}", error.lineno)
    except ValueError as error:
        _unreadable(source, f"not valid JSON: {error}", reader.line(reader.at))
    except _ExcessError as error:
        _unreadable(source, str(error), error.line)
    return None


class _JsonReader:
    """Reads JSON and notes lines; strings and numbers are read by Python's own decoder."""

    _SPACE = re.compile(r"[ \t\n\r]*")

    def __init__(self, text: str, source: Source) -> None:
        self.at = 0
        """Where the value begins that is read now."""
        self._text, self._source = text, source
        self._line_ends = [match.start() for match in re.finditer("\n", text)]
        self._decode: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder(
            parse_constant=refuse_constant, parse_int=parse_integer, parse_float=parse_float
        ).raw_decode

    def line(self, at: int) -> int:
        return bisect.bisect_left(self._line_ends, at) + 1

    def skip_space(self, at: int) -> int:
        match = self._SPACE.match(self._text, at)
        return match.end() if match else at

    def value(self, path: KeyPath, at: int) -> tuple[Any, int]:
        """Read the value that begins at ``at``; returns it, and where it ends."""
        self.at = at
        _note_value(self._source, path, self.line(at))
        char = self._text[at : at + 1]
        if char == "{":
            return self._object(path, self.skip_space(at + 1))
        if char == "[":
            return self._array(path, self.skip_space(at + 1))
        value, end = self._decode(self._text, at)
        return (_as_text(value) if isinstance(value, str) else value), end

    def _object(self, path: KeyPath, at: int) -> tuple[dict[str, object], int]:
        result: dict[str, object] = {}
        if self._text[at : at + 1] == "}":
            return result, at + 1
        while True:
            if self._text[at : at + 1] != '"':
                raise json.JSONDecodeError("Expecting a key in double quotes", self._text, at)
            self.at = at
            key, end = self._decode(self._text, at)
            key, line = _as_text(key), self.line(at)
            if key in result:
                first = self._source.lines[(*path, key)]
                self._source.problems.append(_duplicate(self._source, (*path, key), line, first))
            self._source.lines[(*path, key)] = line
            end = self._expect(":", self.skip_space(end))
            result[key], end = self.value((*path, key), self.skip_space(end))
            end = self.skip_space(end)
            if self._text[end : end + 1] == "}":
                return result, end + 1
            at = self.skip_space(self._expect(",", end))

    def _array(self, path: KeyPath, at: int) -> tuple[list[Any], int]:
        result: list[Any] = []
        if self._text[at : at + 1] == "]":
            return result, at + 1
        while True:
            item, end = self.value((*path, str(len(result))), at)
            result.append(item)
            end = self.skip_space(end)
            if self._text[end : end + 1] == "]":
                return result, end + 1
            at = self.skip_space(self._expect(",", end))

    def _expect(self, char: str, at: int) -> int:
        if self._text[at : at + 1] != char:
            raise json.JSONDecodeError(f"Expecting {char!r}", self._text, at)
        return at + 1


# -- several files as one -------------------------------------------------------------------------


@define
class Document:
    """A run file together with the files that are laid over and under its sections.

    Attributes:
        main: the run file.
        values: its values with those of the other files merged in.
        over: keys of ``models`` from another file, which win over those of the run file.
        under: keys of ``pipeline_config`` from another file, over which those of the run file win.
        base: another run file, for ``base_sections``, which this file does not have.
        unreadable: sections whose other file could not be read.
    """

    main: Source
    values: dict[str, object]
    over: Source | None = None
    under: Source | None = None
    base: Source | None = None
    base_sections: frozenset[str] = frozenset()
    unreadable: frozenset[str] = frozenset()

    @property
    def problems(self) -> list[LocatedProblem]:
        """What is wrong with the files as YAML or JSON."""
        return [problem for source in self._sources for problem in source.problems]

    @property
    def _sources(self) -> list[Source]:
        sources = (self.main, self.over, self.under, self.base)
        return [source for source in sources if source is not None]

    def locate(self, path: KeyPath, message: str) -> LocatedProblem:
        """Say in which file, and where in it, ``path`` is written."""
        source, inside = self._origin(path)
        return source.problem(inside, message)

    def is_unreadable(self, problem: LocatedProblem) -> bool:
        """Return whether ``problem`` follows from a value, at or below its path, that cannot be
        read."""
        length = len(problem.path)
        return any(
            problem.path == path[:length]
            for source in self._sources
            if source.file == problem.file and length
            for path in source.unreadable
        )

    def folder_of(self, path: KeyPath) -> Path:
        """Folder that a relative path which is written at ``path`` begins from."""
        return self._origin(path)[0].file.parent.resolve()

    def _origin(self, path: KeyPath) -> tuple[Source, KeyPath]:
        section, inside = path[:1], path[1:]
        if self.over and section == ("models",) and inside and inside in self.over.lines:
            return self.over, inside
        under = self.under if section == ("pipeline_config",) else None
        if under and path not in self.main.lines and inside in under.lines:
            return under, inside
        if self.base and section and section[0] in self.base_sections:
            return self.base, path
        return self.main, path


def read_document(
    file: Path,
    models_json: Path | None = None,
    *,
    base: tuple[KeyPath, Sequence[str]] | None = None,
) -> Document:
    """Read a run file and those that belong to it.

    Args:
        models_json: a JSON object role -> keys, laid over the file's ``models:`` key by key.
        base: path of the key which names a run file, and the sections that are taken from it.
    """
    main = read_source(file)
    document = Document(main=main, values=dict(main.values or {}))
    if base is not None:
        _take_sections(document, *base)
    if models_json is not None:
        yaml_file = models_json.suffix in (".yaml", ".yml")
        over = read_source(
            models_json, expected=MODELS_FILE, format="yaml" if yaml_file else "json"
        )
        document.over = over
        models = document.values.get("models")
        if over.values and isinstance(models, dict | None):
            document.values["models"] = _laid_over(models or {}, over.values)
    _include_pipeline(document)
    return document


def _take_sections(document: Document, key: KeyPath, sections: Sequence[str]) -> None:
    """Take ``sections`` that the file does not have from the run file that it names."""
    section, name = key
    written = document.values.get(section)
    path = written.get(name) if isinstance(written, dict) else None
    if not isinstance(path, str) or not path.strip() or written_path_problem(path):
        return  # not written, or wrong as every path can be
    file = document.folder_of(key) / Path(path).expanduser()
    base = read_source(file, expected=BASE_FILE)
    missing = [name for name in sections if document.values.get(name) is None]
    if base.values is None:
        document.unreadable |= set(missing)
        if file.is_file():
            document.base = base
        else:  # it is this line that is wrong
            message = f"there is no file {file}; {BASE_FILE}"
            document.main.problems.append(document.main.problem(key, message))
        return
    document.base = base
    document.base_sections = frozenset(name for name in missing if name in base.values)
    document.values |= {name: base.values[name] for name in document.base_sections}


def _laid_over(roles: dict[str, object], over: dict[str, object]) -> dict[str, object]:
    merged = dict(roles)
    for name, value in over.items():
        old = merged.get(name)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[name] = {**old, **value} if both else value  # type: ignore[dict-item]
    return merged


def _include_pipeline(document: Document) -> None:
    """Replace ``pipeline_config.pipeline_config_path`` by the keys of that file."""
    section, key = "pipeline_config", "pipeline_config_path"
    written = document.values.get(section)
    if not isinstance(written, dict) or key not in written:
        return
    beside = {name: value for name, value in written.items() if name != key}
    name = written[key]
    if not isinstance(name, str) or not name.strip():
        document.unreadable |= {section}
        message = f"{name!r} must be the path of a YAML or JSON file, from the folder of this file"
        document.main.problems.append(document.locate((section, key), message))
        return
    if message := written_path_problem(name):
        document.unreadable |= {section}
        document.main.problems.append(document.locate((section, key), message))
        return
    file = document.folder_of((section, key)) / Path(name).expanduser()
    document.under = read_source(file, expected=PIPELINE_FILE)
    if document.under.values is None:
        document.unreadable |= {section}
        if not file.is_file():  # it is this line that is wrong
            document.under.problems.clear()
            message = f"there is no file {file}; {PIPELINE_FILE}"
            document.main.problems.append(document.locate((section, key), message))
        return
    document.values[section] = {**document.under.values, **beside}
