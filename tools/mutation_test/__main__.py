"""Change a seeded sample of the source, one place at a time, and see which changes tests notice.

    uv run tools/mutation_test --sample 150 --seed 0
    uv run tools/mutation_test --sample 20 --package distill-checkpoint
    uv run tools/mutation_test --list --sample 150         # what would be changed

A mutant is one small change of one line of a package: a comparison at its edge, a constant, an
operator, a condition, a call that is left out, a value that is returned. For each, those tests of
its package run (``tests/<package>`` and what ``TESTS`` names) that reach the line, quickest first,
until one fails. Which these are is measured once for each folder of tests and kept in
``outputs/mutation``, until the source of the package changes; tests in files that changed since
then always run. What runs at import reaches no test of its own: then, and where no test reaches a
line, the tests of its file run, and the others, for ``--budget`` seconds.

A mutant that no test notices has survived: it shows a behaviour that nothing holds, or it is
equivalent, which only a reader can tell. The source is changed in a copy of the tree; the tree
itself is never touched.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with threads is not safe to fork
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutation_test.choice import Chooser
from mutation_test.mutants import Mutant, find_mutants
from mutation_test.runs import Outcome, Selection, run_tests


def main() -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="tools/mutation_test", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--sample", type=int, default=150, help="number of changes (default 150)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--package", action="append", help="only this member; may be repeated")
    parser.add_argument("--only", type=int, nargs="*", help="only these numbers of the sample")
    parser.add_argument("--list", action="store_true", help="print the sample, run nothing")
    parser.add_argument(
        "--budget", type=float, default=120, help="seconds for a change whose tests are not known"
    )
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(args.root, Path(folder) / "tree")
        files = sorted(tree.glob("*/*/pyproject.toml"))
        members = [f.parent for f in files if not args.package or f.parent.name in args.package]
        mutants = [mutant for member in members for mutant in find_mutants(tree, member)]
        sample = random.Random(args.seed).sample(mutants, min(args.sample, len(mutants)))
        # A package after the other, as each one's tests are measured first.
        numbered = dict(enumerate(sorted(sample, key=lambda mutant: mutant.member), 1))
        if args.only is not None:
            numbered = {number: numbered[number] for number in args.only}
        print(f"{len(numbered)} of {len(mutants)} changes, seed {args.seed}", flush=True)
        if args.list:
            print(*(f"{number}: {mutant}" for number, mutant in numbered.items()), sep="\n")
            return 0
        return run_mutants(args.root, tree, numbered, args.budget)


def run_mutants(root: Path, tree: Path, mutants: dict[int, Mutant], budget: float) -> int:
    """Run the tests on each mutant, and print the score of each package."""
    commit = git(root, "stash", "create").strip() or git(root, "rev-parse", "HEAD").strip()
    chooser = Chooser(root, tree, commit)
    results: dict[int, str] = {}
    noticing: set[str] = set()

    def run(number: int, selection: Selection, words: dict[str, str]) -> None:
        began = time.monotonic()
        outcome = run_on_mutant(tree, mutants[number], selection, number)
        results[number] = words.get(outcome.result, outcome.result)
        noticing.add(outcome.test)
        note = f"{time.monotonic() - began:.0f} s, {len(selection.tests)} tests"
        print(f"{number}: {results[number]} ({note}): {mutants[number]}", outcome.test, flush=True)

    for number, mutant in mutants.items():
        selection, is_reached = chooser.choose(mutant, budget)
        run(number, selection, {} if is_reached else {"survived": "not reached"})
    for number, result in sorted(results.items()):
        if result in ("survived", "not reached"):
            selection = chooser.choose_elsewhere(mutants[number], budget)
            words = {"killed": "elsewhere", "timeout": "elsewhere", "survived": result}
            run(number, selection, words)
    outcome = run_tests(tree, chooser.select(sorted(noticing - {""})), timeout=3600)
    if outcome.result != "survived":
        print(f"{outcome.test} fails without any change too, so what it notices says nothing")
        return 1
    print_scores(collections.Counter((mutants[n].member, r) for n, r in results.items()))
    return 0


def run_on_mutant(tree: Path, mutant: Mutant, selection: Selection, number: int) -> Outcome:
    """Run the tests with the change made in ``tree``, and take it back."""
    file = tree / mutant.file
    source = file.read_bytes()
    try:
        file.write_bytes(mutant.change(source))
        # Else bytecode of another source of this size and second would be taken for this one's.
        os.utime(file, (number, number))
        return run_tests(tree, selection, timeout=120 + 5 * selection.seconds)
    finally:
        file.write_bytes(source)


def print_scores(results: collections.Counter[tuple[str, str]]) -> None:
    """Print how many mutants of each package had which result, and the share that was noticed."""
    columns = ("killed", "timeout", "elsewhere", "survived", "not reached")
    print("\n" + "package".ljust(24) + "".join(f"{column:>13}" for column in columns))
    for member in sorted({member for member, _ in results}):
        print(member.ljust(24) + "".join(f"{results[member, column]:13}" for column in columns))
    counts = {column: sum(results[m, r] for m, r in results if r == column) for column in columns}
    own, all_tests = (sum(counts[c] for c in columns[:n]) for n in (2, 3))
    print(
        f"noticed by tests of the package: {own / results.total():.0%} of {results.total()}; "
        f"by any: {all_tests / results.total():.0%}"
    )


def copy_tree(root: Path, folder: Path) -> Path:
    """Copy what git knows of a checkout, changes that are not committed included."""
    for name in git(root, "ls-files", "-co", "--exclude-standard").splitlines():
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    return folder


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
