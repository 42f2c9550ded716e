"""Whatever the check of a run file accepts runs to its end, and a stop changes nothing of it.

``tools/random_runs.py`` draws as many as one likes.
"""

from __future__ import annotations

import pytest
from random_runs import Folders, try_file


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    return Folders(tmp_path_factory.mktemp("shared"))


@pytest.mark.parametrize(
    "seed", [101, 105, 109, *(pytest.param(n, marks=pytest.mark.slow) for n in range(200, 240))]
)
def test_accepted_random_files_run_stop_and_resume(seed, folders, tmp_path):
    outcome = try_file(seed, folders, tmp_path)
    assert outcome.differences == ()
    assert outcome.problems or outcome.files > 5
    if seed < 200:
        assert not outcome.problems
