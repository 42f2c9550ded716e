"""Every kind of file that is read, mutated: an error of the framework, or the right content.

A mutation of each kind here, and 2,000 of all before a release: `uv run pytest -m slow` here, or
`uv run tools/fuzz_files --mutations 2000` with another `--seed`.
"""

from __future__ import annotations

import random

import pytest
import torch
from distill_protocols import WeightsError
from fuzz_files.fuzz import fuzz
from fuzz_files.kinds import Kind, SilentDifferenceError
from fuzz_files.mutations import mutate_bytes, mutate_json, mutate_safetensors, mutate_yaml
from fuzz_files.other_kinds import all_kinds
from slow_cases import slow_but

KINDS = all_kinds()
torch.set_num_threads(1)


QUICK = [kind.name for kind in KINDS if not kind.name.startswith(("LTX", "SD 3"))]
"""What other families read goes through the same readers, and building their models takes long."""


@pytest.mark.parametrize("kind", slow_but(QUICK, KINDS, lambda kind: kind.name))
def test_a_mutated_file_gives_an_error_or_its_content(kind):
    tally = fuzz(kind, 1, seed=12)
    assert tally.findings == ()
    assert tally.refused + tally.accepted == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_many_mutated_files_give_an_error_or_their_content(kind):
    assert fuzz(kind, -(-2000 // len(KINDS)), seed=1).findings == ()


def test_mutations_are_functions_of_their_seed():
    full = {
        mutate_json: b'{"a": [1, {"b": "x"}], "c": 2.5}',
        mutate_yaml: b"a: [1, {b: x}]\nc: 2.5\n",
        mutate_bytes: b"0123456789" * 9,
        mutate_safetensors: (70).to_bytes(8, "little")
        + b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'.ljust(70) + bytes(8),
    }  # fmt: skip
    for mutate, content in full.items():
        drawn = [mutate(content, random.Random(seed)) for seed in range(200)]
        assert drawn == [mutate(content, random.Random(seed)) for seed in range(200)]
        assert len({changed for _, changed in drawn}) > 60
        assert sum(changed != content for _, changed in drawn) > 190


def read_number(folder):
    text = (folder / "a").read_text()
    if text == "refuse":
        raise WeightsError("a wrong file")
    if text == "empty":
        raise WeightsError("")
    if text == "differ":
        raise SilentDifferenceError("another state")
    if text == "break":
        raise RecursionError
    return text


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("refuse", None), ("take", None), ("empty", "an error without a message"),
        ("differ", "a silent difference: another state"), ("break", "RecursionError"),
    ],
)  # fmt: skip
def test_fuzzing_reports_wrong_answers_as_findings(tmp_path, monkeypatch, text, outcome):
    (tmp_path / "a").write_text("whole")
    monkeypatch.setattr("fuzz_files.fuzz._replace", lambda file, draw: str(file.write_text(text)))
    kind = Kind(
        name="a", template=lambda: tmp_path, file="a", use=read_number,
        mutate=lambda content, draw: ("text", text.encode()),
    )  # fmt: skip
    tally = fuzz(kind, 20)
    assert tally.refused == 20 * (text in ("refuse", "empty"))
    assert tally.accepted == 20 * (text == "take")
    assert len(tally.findings) == 20 * (outcome is not None)
    assert all(finding.outcome.startswith(str(outcome)) for finding in tally.findings)


def test_the_files_that_matter_most_are_among_them():
    names = " ".join(kind.file for kind in KINDS)
    matter = (
        "manifest.json", "loop.json", "run.json", "index.json", "model_index.json", "config.json",
        "tokenizer.json", "constants.safetensors", "shard-00000",
    )  # fmt: skip
    assert [name for name in matter if name not in names] == []
