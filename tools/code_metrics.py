"""Measure the code of this workspace, or of two workspaces side by side, as markdown tables.

    uv run python tools/code_metrics.py                        # this tree
    uv run python tools/code_metrics.py --against ../base      # this tree and another one
    uv run python tools/code_metrics.py PATH --types           # also count type checker errors

The code is parsed and never imported. Code is every `*.py` file below the `src` folder of a member
(`packages/*` and `apps/*`), tests are every `*.py` file below `tests`, and a line is a line of the
file, whatever is on it. What the rows count:

- Length of a function: from its `def` to its end, without its docstring. Nested functions count.
- Single-use private helper: a function or method `_name` (no dunder, not nested in a function) that
  its module refers to exactly once. A helper that calls itself cannot be inlined, so the reference
  inside its own body counts too; a method that only a decorator registers has no reference.
- Import cycle: a strongly connected component of more than one module in the graph of all import
  statements, those under TYPE_CHECKING included. `from package import name` points at the module
  `package.name` if there is one, else at `package`; loading a submodule does not count as an import
  of its parents. The row below it leaves out the imports inside functions.
- Public: a name without a leading underscore, at module level or in a public class.
- `Any` in public signatures: parameters and results of public functions and methods, `__init__` and
  `__call__` included, whose annotation contains `Any` anywhere (`**kwargs: Any` is one).
- Fully annotated: functions and methods with an annotation on the result (`__init__` is excused)
  and on every parameter except `self` and `cls`.
- Comment lines: lines that begin with `#`, per line with code on it (no blank line, no docstring).
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import statistics
import subprocess
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from workspace import ROOT, read_members

Function = ast.FunctionDef | ast.AsyncFunctionDef
LONG_FUNCTION = 60
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


@dataclass(frozen=True)
class Module:
    """One parsed source file of a member."""

    name: str
    is_package: bool
    member: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())


@dataclass(frozen=True)
class Definition:
    """A class or function that is not nested in a function."""

    node: ast.ClassDef | Function
    is_public: bool


def read_modules(root: Path) -> list[Module]:
    """Parse the source of every member."""
    modules = []
    for member in read_members(root).values():
        source = member.folder / "src"
        for path in sorted(source.rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            text = path.read_text()
            modules.append(Module(name, is_package, member.name, path, text, ast.parse(text)))
    return modules


def walk_definitions(body: Iterable[ast.stmt], public: bool = True) -> Iterator[Definition]:
    """Yield the classes, functions and methods of a module."""
    for node in body:
        if isinstance(node, ast.ClassDef | Function):
            is_public = public and not node.name.startswith("_")
            yield Definition(node, is_public)
            if isinstance(node, ast.ClassDef):
                yield from walk_definitions(node.body, is_public)


def function_length(function: Function) -> int:
    """Count the lines from ``def`` to the end, without the docstring."""
    length = node_length(function)
    return length if ast.get_docstring(function) is None else length - node_length(function.body[0])


def node_length(node: ast.stmt) -> int:
    return cast(int, node.end_lineno) - node.lineno + 1


def count_single_use_helpers(module: Module) -> int:
    uses = Counter(
        node.id if isinstance(node, ast.Name) else node.attr
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Name | ast.Attribute)
    )
    return sum(
        re.match(r"_(?!_)", d.node.name) is not None and uses[d.node.name] == 1
        for d in walk_definitions(module.tree.body)
        if isinstance(d.node, Function)
    )


def signature_annotations(function: Function) -> Iterator[ast.expr | None]:
    """Yield the annotation of each parameter that a caller gives, and of the result."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    if positional and positional[0].arg in {"self", "cls"}:
        positional = positional[1:]
    stars = [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    for argument in [*positional, *arguments.kwonlyargs, *stars]:
        yield argument.annotation
    if function.name != "__init__":
        yield function.returns


def count_any(function: Function) -> int:
    """Count the annotations of a signature that contain ``Any``."""
    annotations = [ast.unparse(a) for a in signature_annotations(function) if a is not None]
    return sum(re.search(r"\bAny\b", annotation) is not None for annotation in annotations)


def count_code_and_comments(text: str) -> tuple[int, int]:
    """Count the lines with code on them, docstrings aside, and the lines that begin with ``#``."""
    code: set[int] = set()
    comments = 0
    begins_statement = True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments += not token.line[: token.start[1]].strip()
        elif token.type in LAYOUT:
            begins_statement = begins_statement or token.type != tokenize.NL
        else:
            if not (begins_statement and token.type == tokenize.STRING):
                code.update(range(token.start[0], token.end[0] + 1))
            begins_statement = False
    return len(code), comments


def imported_modules(module: Module, known: dict[str, Module], with_lazy: bool) -> Iterator[str]:
    """Yield the modules of the workspace that ``module`` imports, by name."""
    pending: list[ast.AST] = [module.tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:  # Each dot after the first goes one package up.
                parents = module.name.split(".") + ["__init__"] * module.is_package
                source = ".".join([*parents[: -node.level], *([source] if source else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield from [name for name in (inner, source) if name in known][:1]
        if with_lazy or not isinstance(node, Function):
            pending.extend(ast.iter_child_nodes(node))


def count_cycles(modules: list[Module], with_lazy: bool) -> int:
    """Count the strongly connected components of more than one module (Kosaraju)."""
    known = {m.name: m for m in modules}
    graph = {m.name: set(imported_modules(m, known, with_lazy)) - {m.name} for m in modules}
    importers: dict[str, set[str]] = {name: set() for name in graph}
    for name, targets in graph.items():
        for target in targets:
            importers[target].add(name)
    visited: set[str] = set()
    finished = [name for start in graph for name in finish_order(start, graph, visited)]
    visited = set()
    components = [list(finish_order(start, importers, visited)) for start in reversed(finished)]
    return sum(len(component) > 1 for component in components)


def finish_order(start: str, graph: dict[str, set[str]], visited: set[str]) -> Iterator[str]:
    """Yield the nodes that ``start`` reaches and that are not visited yet, deepest first."""
    if start not in visited:
        visited.add(start)
        for target in sorted(graph[start]):
            yield from finish_order(target, graph, visited)
        yield start


def count_exported_names(module: Module) -> int:
    """Count the names of ``__all__``, which is a literal list or tuple."""
    for node in module.tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return len(ast.literal_eval(node.value))
    return 0


def count_type_errors(root: Path) -> str:
    """Count what basedpyright complains of, with the environment and the settings of the tree."""
    if not (root / ".venv").is_dir():
        raise SystemExit(f"{root} has no .venv, from which types are read. Run `uv sync` there.")
    result = subprocess.run(
        ["basedpyright", "--outputjson"], cwd=root, capture_output=True, text=True, check=False
    )
    return str(json.loads(result.stdout)["summary"]["errorCount"])


def percent(values: Iterable[bool]) -> str:
    values = list(values)
    return f"{100 * sum(values) / max(len(values), 1):.1f} %"


def measure_tree(root: Path, modules: list[Module], with_types: bool) -> dict[str, str]:
    """Measure the workspace as a whole: row title -> value."""
    nodes = [node for m in modules for node in ast.walk(m.tree)]
    lengths = sorted(function_length(n) for n in nodes if isinstance(n, Function))
    classes = [n for n in nodes if isinstance(n, ast.ClassDef)]
    definitions = [d for m in modules for d in walk_definitions(m.tree.body)]
    functions = [d.node for d in definitions if isinstance(d.node, Function)]
    public = [d.node for d in definitions if d.is_public]
    signatures = [f for f in functions if f in public or f.name in {"__init__", "__call__"}]
    lines = sum(m.lines for m in modules)
    longest_file = max(modules, key=lambda m: m.lines)
    longest_class = max(classes, key=node_length)
    helpers = sum(map(count_single_use_helpers, modules))
    code, comments = map(sum, zip(*(count_code_and_comments(m.text) for m in modules), strict=True))
    tests = sum(len(p.read_text().splitlines()) for p in (root / "tests").rglob("*.py"))
    row = {
        "lines of code": f"{lines:,}",
        "modules": str(len(modules)),
        "lines of a module: median": f"{statistics.median(m.lines for m in modules):.0f}",
        "longest file": f"{longest_file.lines} (`{longest_file.path.name}`)",
        "longest class": f"{node_length(longest_class)} (`{longest_class.name}`)",
        "lines of a function: median": f"{statistics.median(lengths):.0f}",
        "lines of a function: p90": str(lengths[int(0.9 * (len(lengths) - 1))]),
        "lines of a function: max": str(lengths[-1]),
        f"functions over {LONG_FUNCTION} lines": percent(n > LONG_FUNCTION for n in lengths),
        "single-use private helpers per 1,000 lines": f"{1000 * helpers / lines:.1f}",
        "names in `__all__`": str(sum(count_exported_names(m) for m in modules if m.is_package)),
        "import cycles": str(count_cycles(modules, with_lazy=True)),
        "import cycles without imports in functions": str(count_cycles(modules, with_lazy=False)),
        "`Any` in public signatures": str(sum(map(count_any, signatures))),
        "comment lines per line of code": f"{100 * comments / code:.1f} %",
        "public docstrings": percent(ast.get_docstring(node) is not None for node in public),
        "fully annotated": percent(None not in signature_annotations(f) for f in functions),
        "test lines per line of code": f"{tests / lines:.2f}",
    }
    return row | ({"type checker errors": count_type_errors(root)} if with_types else {})


def measure_members(modules: list[Module]) -> dict[str, str]:
    """Measure each member: its name -> lines, modules and names in ``__all__`` of its package."""
    rows = {}
    for member in sorted({m.member for m in modules}):
        own = [m for m in modules if m.member == member]
        exported = sum(count_exported_names(m) for m in own if m.is_package and "." not in m.name)
        rows[member] = f"{sum(m.lines for m in own):,} / {len(own)} / {exported}"
    return rows


def format_table(corner: str, columns: dict[str, dict[str, str]]) -> str:
    """Format one column a tree; a row that a tree does not have shows a dash there."""
    titles = list(dict.fromkeys(row for column in columns.values() for row in column))
    table = [[corner, *columns]]
    table += [[title, *(column.get(title, "-") for column in columns.values())] for title in titles]
    table.insert(1, ["-", *("-:" for _ in columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the code of one or two workspaces.")
    parser.add_argument("path", nargs="?", type=Path, default=ROOT, help="root of a checkout")
    parser.add_argument("--against", type=Path, help="root of another checkout, shown beside it")
    parser.add_argument("--types", action="store_true", help="count type checker errors (slow)")
    options = parser.parse_args()
    trees = [path.resolve() for path in (options.against, options.path) if path is not None]
    modules = {path: read_modules(path) for path in trees}
    names = [
        str(path) if len({p.name for p in trees}) < len(trees) else path.name for path in trees
    ]
    whole = [measure_tree(path, modules[path], options.types) for path in trees]
    members = [measure_members(modules[path]) for path in trees]
    print(format_table("whole workspace", dict(zip(names, whole, strict=True))))
    print()
    print(format_table("lines / modules / `__all__`", dict(zip(names, members, strict=True))))


if __name__ == "__main__":
    main()
