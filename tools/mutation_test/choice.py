"""Choose the tests that may notice a change, from what tests of its package reach."""

from __future__ import annotations

import collections
import itertools
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mutation_test.line_map import LineMap, build_line_map, read_line_map
from mutation_test.mutants import Mutant
from mutation_test.runs import Selection, import_modules

TESTS: dict[str, tuple[str, ...]] = {
    "distill-adapters-hunyuan": ("adapters_hunyuan",),
    "distill-adapters-longcat": ("adapters_longcat",),
    "distill-adapters-ltx": ("adapters_ltx",),
    "distill-adapters-ltx2": ("adapters_ltx2",),
    "distill-adapters-qwen-image": ("adapters_qwen_image",),
    "distill-adapters-wan": ("adapters_wan",),
    "distill-adapters-z-image": ("adapters_z_image",),
    "distill-checkpoint": ("checkpoint",),
    "distill-conditioning": ("conditioning",),
    "distill-conformance": ("conformance",),
    "distill-diffusers": ("diffusers", "adapters_wan", "adapters_ltx"),
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
    "report": ("report_app",),
    "sample": ("sample_app",),
    "train": ("app",),
    "trajectories": ("trajectories_app",),
}
"""Member of the workspace -> folders of its tests; any other member's folder has its own name."""
SLOW = 1.0
"""Seconds above which a test waits until the quick ones of all files have passed."""


@dataclass(frozen=True)
class Chooser:
    """Choose tests by line maps, which are measured where there is none for this source.

    Attributes:
        root: of the checkout; maps are kept in ``outputs/mutation`` there, until the source of
            the package in question changes.
        tree: copy of the checkout.
        commit: what ``tree`` is a copy of.
    """

    root: Path
    tree: Path
    commit: str
    _maps: dict[str, LineMap] = field(default_factory=dict)

    def choose(self, mutant: Mutant, budget: float) -> tuple[Selection, bool]:
        """Return the tests of its package to run for a mutant, and whether any reaches it.

        Those that reach it, all of them; else those of its file and then of its package, as many
        as take ``budget`` seconds. Files of tests that changed since their map run too.
        """
        folders = TESTS.get(mutant.member, (mutant.member,))
        maps = [self._line_map(folder, mutant) for folder in folders]
        tests = _find_tests(maps, mutant, mutant.lines)
        is_reached = bool(tests) or mutant.runs_at_import
        if not tests:
            near = _find_tests(maps, mutant)
            others = [t for m in maps for t in _sort_tests(m.passing - set(near), m.seconds)]
            tests = _limit([*near, *others], maps, budget)
        changed = [self._changes(m.commit, f"tests/{m.folder}/test_*.py") or () for m in maps]
        names = {name for names in changed for name in names if (self.tree / name).is_file()}
        return _select(maps, tests, names), is_reached

    def choose_elsewhere(self, mutant: Mutant, budget: float) -> Selection:
        """Return tests of other packages that reach a mutant, as far as they were measured."""
        own = TESTS.get(mutant.member, (mutant.member,))
        others = sorted(path.name for path in self._cache.iterdir() if path.name not in own)
        maps = [m for folder in others if (m := self._known_map(folder, mutant)) is not None]
        tests = _find_tests(maps, mutant, mutant.lines) or _find_tests(maps, mutant)
        return _select(maps, _limit(tests, maps, budget), ())

    def select(self, tests: Sequence[str]) -> Selection:
        """Select tests by their ids, as they were measured."""
        return _select(list(self._maps.values()), tests, ())

    @property
    def _cache(self) -> Path:
        return self.root / "outputs" / "mutation"

    def _line_map(self, folder: str, mutant: Mutant) -> LineMap:
        line_map = self._known_map(folder, mutant)
        if line_map is not None:
            return line_map
        print(f"measuring the tests in tests/{folder}", flush=True)
        line_map = build_line_map(self.tree, folder, self.commit, self._cache / folder)
        for test in line_map.failed:
            print(f"left out, as it fails while lines are measured: {test}", flush=True)
        return self._keep(folder, line_map)

    def _known_map(self, folder: str, mutant: Mutant) -> LineMap | None:
        """Return the map of a folder unless the mutant's package has changed since."""
        line_map = self._maps.get(folder) or read_line_map(self._cache / folder)
        source = mutant.file.partition("/src/")[0] + "/src"
        if line_map is None or self._changes(line_map.commit, source) != []:
            return None
        return self._keep(folder, line_map)

    def _keep(self, folder: str, line_map: LineMap) -> LineMap:
        if folder not in self._maps:
            import_modules(line_map.modules, self.tree)
        self._maps[folder] = line_map
        return line_map

    def _changes(self, commit: str, paths: str) -> list[str] | None:
        """List the files that changed since ``commit``; None if git no longer has it."""
        if commit == self.commit:
            return []
        done = subprocess.run(
            ["git", "diff", "--name-only", commit, self.commit, "--", paths],
            cwd=self.root, check=False, capture_output=True, text=True,
        )  # fmt: skip
        return done.stdout.splitlines() if done.returncode == 0 else None


def _select(maps: Sequence[LineMap], tests: Sequence[str], changed: Collection[str]) -> Selection:
    """Select tests, and all those in files that changed since the maps were measured."""
    known = {test for m in maps for test in m.seconds if _file(test) not in changed}
    files = sorted({*changed, *(_file(test) for test in tests)})
    return Selection(tests, files, known, sum(m.seconds.get(t, 0) for m in maps for t in tests))


def _find_tests(maps: Sequence[LineMap], mutant: Mutant, lines: range | None = None) -> list[str]:
    if lines is not None and mutant.runs_at_import:
        return []  # the first test that imports the module reaches it, whatever it is about
    return [t for m in maps for t in _sort_tests(m.find_tests(mutant.file, lines), m.seconds)]


def _limit(tests: Sequence[str], maps: Sequence[LineMap], budget: float) -> list[str]:
    seconds = {test: time for line_map in maps for test, time in line_map.seconds.items()}
    sums = itertools.accumulate(seconds[test] for test in tests)
    return [test for test, total in zip(tests, sums, strict=True) if total <= budget]


def _sort_tests(tests: Iterable[str], seconds: Mapping[str, float]) -> list[str]:
    """Sort quick tests first, and those of a file together: they share what they set up."""
    tests = list(tests)
    of_file: dict[str, float] = collections.defaultdict(float)
    for test in tests:
        of_file[_file(test)] += seconds[test]

    def order(test: str) -> tuple[bool, float, str, float]:
        file = _file(test)
        return seconds[test] > SLOW, of_file[file], file, seconds[test]

    return sorted(tests, key=order)


def _file(test: str) -> str:
    return test.partition("::")[0]
