"""Change a seeded sample of the source, one place at a time, and see which changes tests notice.

    uv run python tools/mutation_test.py --sample 150 --seed 0           # hours; over all packages
    uv run python tools/mutation_test.py --sample 20 --package distill-checkpoint
    uv run python tools/mutation_test.py --list --sample 150             # what would be changed

A mutant is one small change of one line of a package: a comparison at its edge, a constant, an
operator, a condition, a call that is left out, a value that is returned. For each, the tests of its
package run (``tests/<package>`` and what ``TESTS`` names) until the first fails. A mutant that no
test notices has survived: it shows a behaviour that nothing holds, or it is equivalent, which only
a reader can tell. The source is changed in a copy of the tree; the tree itself is never touched.
Messages, docstrings, annotations and imports are not changed.
"""

from __future__ import annotations

import argparse
import ast
import collections
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS: dict[str, tuple[str, ...]] = {
    "distill-adapters-ltx": ("adapters_ltx",),
    "distill-adapters-wan": ("adapters_wan",),
    "distill-checkpoint": ("checkpoint",),
    "distill-conditioning": ("conditioning",),
    "distill-conformance": ("conformance",),
    "distill-diffusers": ("diffusers", "adapters_wan"),
    "distill-evaluation": ("evaluation",),
    "distill-media": ("media",),
    "distill-methods": ("methods", "invariants"),
    "distill-protocols": ("protocols",),
    "distill-runfile": ("runfile",),
    "distill-runtime": ("runtime",),
    "distill-trainer": ("trainer",),
    "export": ("export_app",),
    "migrate": ("migrate_app",),
    "preprocess": ("preprocess_app",),
    "sample": ("sample_app",),
    "train": ("app",),
    "trajectories": ("trajectories_app",),
}
"""Member of the workspace -> folders of its tests; the first ones run first."""
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
    """One change: ``old``, at offsets ``start`` to ``end`` (bytes) of ``file``, becomes ``new``."""

    member: str
    file: Path
    line: int
    start: int
    end: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}: {self.old!r} -> {self.new!r}"

    def source(self) -> bytes:
        text = self.file.read_bytes()
        return text[: self.start] + self.new.encode() + text[self.end :]


def find_mutants(member: Path) -> Iterator[Mutant]:
    """Find every change that can be made in a member of the workspace."""
    for file in sorted((member / "src").rglob("*.py")):
        text = file.read_bytes()
        starts = [0]
        for line in text.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        for node, new in _Places().collect(ast.parse(text)):
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            old = text[start:end].decode()
            if "\n" not in old:
                yield Mutant(member.name, file, node.lineno, start, end, old, new)


class _Places(ast.NodeVisitor):
    """Nodes that are replaced, each with the text that replaces it."""

    def __init__(self) -> None:
        self.places: list[tuple[ast.expr | ast.stmt, str]] = []

    def collect(self, tree: ast.Module) -> list[tuple[ast.expr | ast.stmt, str]]:
        self.visit(tree)
        return self.places

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1:
            other = COMPARISONS[type(node.ops[0])]()
            changed = ast.Compare(node.left, [other], node.comparators)
            self.places.append((node, f"({ast.unparse(changed)})"))
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        other = OPERATORS.get(type(node.op))
        # Text and paths have + and / too, and every other operator would be an error at once.
        if other is not None and not _is_text_or_path(node):
            changed = ast.BinOp(node.left, other(), node.right)
            self.places.append((node, f"({ast.unparse(changed)})"))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        self.places.append((node, f"({ast.unparse(ast.BoolOp(other, node.values))})"))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self.places.append((node, f"bool({ast.unparse(node.operand)})"))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.places.append((node, str(not node.value)))
        elif isinstance(node.value, int | float):
            self.places.append((node, repr(node.value + 1)))

    def visit_If(self, node: ast.If) -> None:
        # TYPE_CHECKING guards imports, which are not changed.
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.places.append((node.test, f"(not ({ast.unparse(node.test)}))"))
            self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self.places.append((node, "pass"))
            self.generic_visit(node)
        # Docstrings are constants in statements of their own.

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not isinstance(node.value, ast.Constant):
            self.places.append((node, "return None"))
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        self.places.append((node, "pass"))  # and not its message

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_arguments(self, node: ast.arguments) -> None:
        for default in (*node.defaults, *node.kw_defaults):
            if default is not None:
                self.visit(default)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.visit(node.args)
        for child in (*node.decorator_list, *node.body):
            self.visit(child)

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


def copy_tree(folder: Path) -> Path:
    """Copy what git knows of the tree, changes that are not committed included."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True
    ).stdout.decode().splitlines()  # fmt: skip
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run_tests(tree: Path, folders: tuple[str, ...], timeout: float) -> str:
    """Run test folders in a tree; return "killed", "timeout" or "survived"."""
    sources = [str(path) for path in sorted(tree.glob("*/*/src"))]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sources),  # before the installed members of ROOT
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/{name}" for name in folders]
    process = subprocess.Popen(
        command, cwd=tree, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        return "survived" if process.wait(timeout) == 0 else "killed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        return "timeout"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=150, help="number of changes (default 150)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--package", action="append", help="only this member; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the sample, run nothing")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one change")
    args = parser.parse_args()
    members = [p for p in sorted(ROOT.glob("*/*/pyproject.toml")) if p.parent.name in TESTS]
    chosen = [p.parent for p in members if not args.package or p.parent.name in args.package]
    mutants = [mutant for member in chosen for mutant in find_mutants(member)]
    sample = random.Random(args.seed).sample(mutants, min(args.sample, len(mutants)))
    print(f"{len(sample)} of {len(mutants)} changes, seed {args.seed}", flush=True)
    if args.list:
        print(*sample, sep="\n")
        return 0
    results: collections.Counter[tuple[str, str]] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        tree = copy_tree(Path(name))
        for member in sorted({mutant.member for mutant in sample}):
            if run_tests(tree, TESTS[member], args.timeout) != "survived":
                print(f"the tests of {member} fail without any change: run them first")
                return 1
        for number, mutant in enumerate(sample, 1):
            began = time.monotonic()
            target = tree / mutant.file.relative_to(ROOT)
            target.write_bytes(mutant.source())
            result = run_tests(tree, TESTS[mutant.member], args.timeout)
            target.write_bytes(mutant.file.read_bytes())
            results[mutant.member, result] += 1
            seconds = time.monotonic() - began
            print(f"{number}: {result} ({seconds:.0f} s): {mutant}", flush=True)
    print(f"\n{'package':24} killed  timeout  survived")
    for member in sorted({member for member, _ in results}):
        counts = [results[member, result] for result in ("killed", "timeout", "survived")]
        print(f"{member:24} {counts[0]:6}  {counts[1]:7}  {counts[2]:8}")
    survived = sum(count for (_, result), count in results.items() if result == "survived")
    print(f"noticed: {1 - survived / len(sample):.0%} of {len(sample)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
