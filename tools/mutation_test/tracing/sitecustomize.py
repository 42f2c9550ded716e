"""Measure lines in each Python process of a map run: the tests', and all that they start.

``record_tests`` writes the id of the test that runs into a file, since an environment variable
does not reach the children of a fork server that is older than the test.
"""

from __future__ import annotations

import os
from pathlib import Path

import coverage

FOLDER = Path(os.environ["MUTATION_TEST_FOLDER"])
NOW = FOLDER / "now"

measurement = coverage.Coverage(
    data_file=FOLDER / "lines", data_suffix=True, config_file=False, auto_data=True,
    include=[f"{os.environ['MUTATION_TEST_TREE']}/*/*/src/*"],
)  # fmt: skip
measurement.set_option("run:patch", ["_exit"])  # with which forked children end
measurement.set_option("run:disable_warnings", ["no-data-collected"])


def enter_test() -> None:
    """Count lines from here on for the test that runs now."""
    measurement.switch_context(NOW.read_text())


measurement.start()
enter_test()
os.register_at_fork(after_in_child=enter_test)
