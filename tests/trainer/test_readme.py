"""The README's method of one's own trains as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

_README = Path(__file__).parents[2] / "packages" / "distill-trainer" / "README.md"


def test_the_code_block_trains_in_forty_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    match = re.search(r"```python\n(.*?)```", _README.read_text(), re.DOTALL)
    assert match
    code = match.group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    assert "distill_methods" not in code
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "readme"}
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the example's layers are initialised as torch does it
        exec(compile(code, str(_README), "exec"), scope)
    lines = (tmp_path / "outputs/match/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss/total_loss"] for line in lines]
    assert losses[-1] < losses[0] / 20
