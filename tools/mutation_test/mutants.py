"""Find every small change that a mutation test can make in the source of a package.

Messages, docstrings, annotations and imports are not changed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change: ``old``, at bytes ``start`` to ``end`` of ``file``, becomes ``new``.

    Attributes:
        member: folder name of the package or app.
        file: path below the root of the tree.
        lines: from the first line of the statement to the changed one; whoever runs the change
            runs one of them.
        runs_at_import: whether the statement stands outside of functions.
    """

    member: str
    file: str
    lines: range
    runs_at_import: bool
    start: int
    end: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.file}:{self.lines[-1]}: {self.old!r} -> {self.new!r}"

    def change(self, source: bytes) -> bytes:
        """Return the source of its file with the change made."""
        return source[: self.start] + self.new.encode() + source[self.end :]


def find_mutants(root: Path, member: Path) -> Iterator[Mutant]:
    """Find every change that can be made in ``member``, a folder below ``root`` with ``src``."""
    for file in sorted((member / "src").rglob("*.py")):
        text = file.read_bytes()
        starts = [0]
        for line in text.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        for place in _Places().collect(ast.parse(text)):
            node = place.node
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            old = text[start:end].decode()
            if "\n" not in old:
                lines = range(min(place.statement, node.lineno), node.lineno + 1)
                name = file.relative_to(root).as_posix()
                yield Mutant(
                    member.name, name, lines, place.runs_at_import, start, end, old, place.new
                )


@dataclass(frozen=True)
class _Place:
    """A node, the text that replaces it, the first line of its statement, and when that runs."""

    node: ast.expr | ast.stmt
    new: str
    statement: int
    runs_at_import: bool


class _Places(ast.NodeVisitor):
    """Collect the nodes that are replaced."""

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._statement = 1
        self._functions = 0

    def collect(self, tree: ast.Module) -> list[_Place]:
        self.visit(tree)
        return self._places

    def visit(self, node: ast.AST) -> None:
        outer = self._statement
        if isinstance(node, ast.stmt):
            self._statement = node.lineno
        super().visit(node)
        self._statement = outer

    def _add(self, node: ast.expr | ast.stmt, new: str) -> None:
        self._places.append(_Place(node, new, self._statement, not self._functions))

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1:
            other = COMPARISONS[type(node.ops[0])]()
            changed = ast.Compare(node.left, [other], node.comparators)
            self._add(node, f"({ast.unparse(changed)})")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        other = OPERATORS.get(type(node.op))
        # Text and paths have + and / too, and every other operator would be an error at once.
        if other is not None and not _is_text_or_path(node):
            changed = ast.BinOp(node.left, other(), node.right)
            self._add(node, f"({ast.unparse(changed)})")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        self._add(node, f"({ast.unparse(ast.BoolOp(other, node.values))})")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._add(node, f"bool({ast.unparse(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._add(node, str(not node.value))
        elif isinstance(node.value, int | float):
            self._add(node, repr(node.value + 1))

    def visit_If(self, node: ast.If) -> None:
        # TYPE_CHECKING guards imports, which are not changed.
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self._add(node.test, f"(not ({ast.unparse(node.test)}))")
            self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self._add(node, "pass")
            self.generic_visit(node)
        # Docstrings are constants in statements of their own.

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not isinstance(node.value, ast.Constant):
            self._add(node, "return None")
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        self._add(node, "pass")  # and not its message

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_arguments(self, node: ast.arguments) -> None:
        for default in (*node.defaults, *node.kw_defaults):
            if default is not None:
                self.visit(default)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for child in (node.args, *node.decorator_list):
            self.visit(child)
        self._functions += 1
        for child in node.body:
            self.visit(child)
        self._functions -= 1

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit(node.args)
        self._functions += 1
        self.visit(node.body)
        self._functions -= 1

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if not isinstance(node.value, ast.Name) or node.value.id not in ("Literal", "Annotated"):
            self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Leave messages as they are."""


def _is_text_or_path(node: ast.BinOp) -> bool:
    words = re.findall(r"[a-z]+", ast.unparse(node).lower())
    text = (ast.JoinedStr, ast.Constant)
    return bool({"path", "folder", "file", "root", "dir", "stage", "index"} & set(words)) or any(
        isinstance(n, text) and not isinstance(getattr(n, "value", ""), int | float)
        for n in ast.walk(node)
    )
