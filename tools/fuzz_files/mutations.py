"""Seeded mutations of files: of structure, of values, of sizes.

Each function takes a file's bytes and a generator, and gives what was done and the new bytes.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import yaml

Mutation = tuple[str, bytes]
Mutator = Callable[[bytes, random.Random], Mutation]


class _Raw:
    """Stands in a tree for JSON text that no Python value becomes."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"raw {self.text[:20]}"


_RAW = [
    _Raw(text)
    for text in (
        "NaN", "-Infinity", "1e999", "9" * 6000, "-" + "9" * 400, "[" * 200_000,
        "[" * 150 + "]" * 150, '{"a":' * 120 + "1" + "}" * 120, '"\\ud800"', '"\\ud83e\\udd8a"',
        '"\\u0000"', "01", "'x'", "tru", '{"a": 1, "a": 2}', "", '"\x01"',
    )
]  # fmt: skip
_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 2.5, -0.0, 1e-320, 1e308, 10**9, 2**31, 2**53 + 1, 2**63, 2**64,
    10**30, "", "x", "3", "../../etc/passwd", "/etc/passwd", "a\x1b[2Jb", "a\u202eb", "\U0001f98a",
    "x" * 300, "..", "\\x", "~nobody77/x", [], {}, [[]], [None], {"": 0}, [0] * 200, ["x"], [-1],
    [10**9, 10**9], {"$tensor": "x"}, {"$scalar": ["int64", 10**30]}, {"$tuple": 3},
]  # fmt: skip


def mutate_json(content: bytes, draw: random.Random) -> Mutation:
    """Change the tree, or now and then the text, of a JSON file."""
    if draw.random() < 0.15:
        return mutate_bytes(content, draw)
    value = json.loads(content)
    label, changed = _mutate_tree(value, draw)
    while draw.random() < 0.2:
        more, changed = _mutate_tree(changed, draw)
        label += f"; {more}"
    return label, _dump(changed).encode("utf-8", "surrogatepass")


def mutate_safetensors(content: bytes, draw: random.Random) -> Mutation:
    """Change the header's tree, its length, or the bytes of a safetensors file."""
    choice = draw.random()
    if choice < 0.15:
        return mutate_bytes(content, draw)
    length = int.from_bytes(content[:8], "little")
    header, rest = content[8 : 8 + length], content[8 + length :]
    if choice < 0.3:
        length = draw.choice(
            [0, 1, length - 1, length + 1, 10**8 + 1, 2**63, 2**64 - 1, len(content)]
        )
        return f"header length {length}", length.to_bytes(8, "little") + header + rest
    if choice < 0.7:
        label, value = _mutate_entries(json.loads(header), draw)
    else:
        label, value = _mutate_tree(json.loads(header), draw)
    text = _dump(value).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    if draw.random() < 0.2:
        size = draw.choice([0, 1, len(rest) // 2, len(rest) + 8])
        label, rest = f"{label}; {size} bytes of tensors", (rest + bytes(8))[:size]
    return label, len(text).to_bytes(8, "little") + text + rest


def mutate_yaml(content: bytes, draw: random.Random) -> Mutation:
    """Change the tree or the text of a YAML file."""
    choice = draw.random()
    if choice < 0.1:
        return mutate_bytes(content, draw)
    if choice < 0.6:
        value = yaml.safe_load(content)
        label, changed = _mutate_tree(value, draw, raw=False)
        text = yaml.safe_dump(changed, sort_keys=False, allow_unicode=draw.random() < 0.5)
        return label, text.encode("utf-8", "surrogatepass")
    lines = content.decode().splitlines()
    at = draw.randrange(len(lines))
    label, line = _mutate_line(lines, at, draw)
    lines[at] = line
    return f"line {at + 1}: {label}", "\n".join(lines).encode("utf-8", "surrogatepass")


def mutate_bytes(content: bytes, draw: random.Random) -> Mutation:
    """Damage a file as disks, downloads and editors do."""
    at = draw.randrange(max(1, len(content)))
    other = bytes([draw.randrange(256)])
    options: list[Mutation] = [
        ("empty", b""),
        ("cut short", content[:at]),
        ("one byte", content[:at] + other + content[at + 1 :]),
        ("bytes put in", content[:at] + draw.randbytes(4) + content[at:]),
        ("bytes left out", content[:at] + content[at + 4 :]),
        ("zeros", bytes(len(content))),
        ("twice", content * 2),
        ("random", draw.randbytes(min(len(content), 4096))),
        ("byte order mark", b"\xef\xbb\xbf" + content),
        ("UTF-16", content[:4096].decode("latin-1").encode("utf-16")),
        ("an LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
        ("a pickle", b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94."),
        ("brackets", b"[" * 200_000),
        ("quotes and backslashes", b'"\\"' * 60_000 + b"\\"),
        ("commas", b"[" + b"0," * 60_000 + b"0]"),
    ]
    return draw.choice(options)


# -- trees ----------------------------------------------------------------------------------------


def _mutate_tree(value: Any, draw: random.Random, *, raw: bool = True) -> tuple[str, Any]:
    root = [copy.deepcopy(value)]
    places = list(_places(root))
    holder, key, path = draw.choice(places)
    odd = draw.choice(_RAW if raw and draw.random() < 0.3 else _VALUES)
    old = holder[key]
    choice = draw.random()
    if choice < 0.45:
        holder[key] = copy.copy(odd)
        return f"{path} = {odd!a:.60}", root[0]
    if choice < 0.6 and len(path) > 0:
        del holder[key]
        return f"{path} left out", root[0] if root else None
    if choice < 0.7 and isinstance(old, int | float):
        holder[key] = draw.choice(
            [old + 1, old - 1, -old, old * 2, old * 10**6, old * 1.5, str(old)]
        )
        return f"{path} = {holder[key]!r}", root[0]
    if choice < 0.8:
        other_holder, other_key, other = draw.choice(places)
        holder[key] = copy.deepcopy(other_holder[other_key])
        return f"{path} = that of {other}", root[0]
    if choice < 0.87 and isinstance(holder, dict):
        new = draw.choice(["", "x", f"{key}x", "a\x1b[31m", "../x", "__metadata__", "$tensor"])
        holder[new] = holder.pop(key)
        return f"{path} is called {new!a}", root[0]
    if choice < 0.93:
        holder[key] = [old]
        return f"{path} in a list", root[0]
    if isinstance(old, dict):
        old[draw.choice(["x", "", "__proto__", "a\nb"])] = copy.copy(odd)
    elif isinstance(old, list):
        old.append(copy.copy(odd))
    else:
        holder[key] = {"x": old}
    return f"{path} has more ({odd!a:.40})", root[0]


def _mutate_entries(header: dict[str, Any], draw: random.Random) -> tuple[str, Any]:
    """Mutate the entries of a safetensors header: offsets, shapes, types."""
    header = copy.deepcopy(header)
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return _mutate_tree(header, draw)
    name, other = draw.choice(names), draw.choice(names)
    entry = header[name]
    begin, end = entry["data_offsets"]
    options: list[tuple[str, str, Any]] = [
        ("another's bytes", "data_offsets", header[other]["data_offsets"]),
        ("later", "data_offsets", [begin + 4, end + 4]),
        ("backwards", "data_offsets", [end, begin]),
        ("longer", "data_offsets", [begin, end + 4]),
        ("far", "data_offsets", [2**62, 2**63]),
        ("floats", "data_offsets", [float(begin), float(end)]),
        ("one more dimension", "shape", [1, *entry["shape"]]),
        ("turned", "shape", entry["shape"][::-1]),
        ("flat", "shape", [end - begin]),
        ("no rows", "shape", [0, *entry["shape"][1:]]),
        ("absurd", "shape", [2**31, 2**31, 2**31]),
        ("70 dimensions", "shape", [1] * 70 + entry["shape"]),
        (
            "another type",
            "dtype",
            draw.choice(["F16", "F64", "I32", "BOOL", "F8_E4M3", "X", "C64"]),
        ),
    ]
    what, key, value = draw.choice(options)
    entry[key] = value
    if draw.random() < 0.2:
        header[f"{name}x"] = header.pop(name)
        what += ", renamed"
    return f"{name}: {what}", header


def _places(root: Sequence[Any]) -> list[tuple[Any, Any, str]]:
    found: list[tuple[Any, Any, str]] = []
    pending: list[tuple[Any, Any, str]] = [(root, 0, "")]
    while pending:
        holder, key, path = pending.pop()
        found.append((holder, key, path))
        value = holder[key]
        items = value.items() if isinstance(value, dict) else ()
        items = enumerate(value[:20]) if isinstance(value, list) else items
        pending += [(value, k, f"{path}.{k}" if path else str(k)) for k, _ in items]
    return found


def _dump(value: Any) -> str:
    if isinstance(value, _Raw):
        return value.text
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))}: {_dump(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_dump, value)) + "]"
    return json.dumps(value)


# -- lines of YAML --------------------------------------------------------------------------------

_BOMB = "\n".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9) if i else 0}]" for i in range(10))
_MERGES = "m0: &m0 {k: v}\n" + "\n".join(
    f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, 10)
)


def _mutate_line(lines: list[str], at: int, draw: random.Random) -> tuple[str, str]:
    line = lines[at]
    key, _, value = line.partition(":")
    odd = draw.choice(
        [
            "!!int abc", "!!bool maybe", "!!float x", "!!null x", "!!str [a]", "!!binary aaa=",
            "!!python/object/apply:os.system [ls]", "!x y", "&a [*a]", "*nothing", "9" * 6000,
            "1e999", ".inf", ".nan", "~", "[" * 3000, "{a: " * 300,
            '"\\ud800"', '"\\0"', '"\\e[2J"',
            '"\\U0001F98A"', '"\\xff"', '"\\UFFFFFFFF"', "0x10", "0o7", "1_000", "- - -", "@",
            "`", "%", "|\n  text", ">-", "2001-01-01", "'", '"', "? [a, b]", "<<", "=", "\t1",
        ]
    )  # fmt: skip
    options = [
        ("a value", f"{key}: {odd}"),
        ("a tag", f"{key}: !!{draw.choice(['int', 'float', 'map', 'seq', 'set', 'str'])}{value}"),
        ("an alias bomb", f"{_BOMB}\n{line}"),
        ("a merge bomb", f"{_MERGES}\n{line}"),
        ("a bomb as key", f"{_BOMB}\n? *b9\n: 3\n{line}"),
        ("an odd key", f"{re.match(' *', line)[0]}{draw.choice(_ODD_KEYS)}: 3\n{line}"),  # type: ignore[index]
        ("a tab", f"\t{line}"),
        ("twice", f"{line}\n{line}"),
        ("indented", f"  {line}"),
        ("a document", f"{line}\n---\n{line}"),
        ("a merge", f"{line}\n<<: {{x: 1}}"),
    ]
    return draw.choice(options)


_ODD_KEYS = [
    "? [a, b]\n",
    '"\\ud800"',
    '"\\e[31m"',
    "~",
    "3",
    "2001-01-01",
    "!!binary aaa=",
    '"a\\nb"',
]
