"""Folders that one process writes at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from distill_protocols import OutputError
from distill_runtime import claim_folder

HOLDER = """
import sys, pathlib
from distill_runtime import claim_folder
claim = claim_folder(pathlib.Path(sys.argv[1]), "writer")
print("claimed", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_one_ends(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "claimed\n"
    with pytest.raises(OutputError, match=f"another process is writing there .pid {holder.pid} on"):
        claim_folder(folder, "writer")
    claim_folder(folder, "worker-1").close()  # another part of it
    holder.kill()  # leaves its file behind
    holder.communicate()
    assert (folder / ".writer.lock").exists()
    with claim_folder(folder, "writer"), pytest.raises(OutputError):
        claim_folder(folder, "writer")
    assert list(folder.iterdir()) == []
