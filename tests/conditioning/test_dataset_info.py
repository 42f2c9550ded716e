"""What a data set says of itself, and what computed it, entry by entry."""

from __future__ import annotations

import pytest
from distill_conditioning import DataConfig, DataSetConfig
from distill_conditioning.dataset_info import data_info
from distill_conditioning.fingerprints import compare_fingerprints
from distill_protocols import WHOLE_ENCODER

HINT = "files that compute nothing count in it too"


def test_samples_are_those_of_all_sets(make_folder, tmp_path):
    folders = [make_folder(tmp_path / str(samples), samples) for samples in (3, 5)]
    sets = tuple(DataSetConfig(path=str(folder)) for folder in folders)
    info = data_info(DataConfig(sets=sets))
    assert info.problems == ()
    assert [one.samples for one in info.sets] == [3, 5]
    assert info.samples == 8


@pytest.mark.parametrize(
    ("stored", "own", "differ"),
    [
        ({"vae.weights": "a"}, {"vae.weights": "b"}, ["vae.weights"]),
        ({WHOLE_ENCODER: "a"}, {WHOLE_ENCODER: "b"}, [WHOLE_ENCODER]),
        # Beside named entries the one hash of everything says nothing more.
        (
            {WHOLE_ENCODER: "a", "tokenizer.words": "a", "vae.weights": "a"},
            {WHOLE_ENCODER: "b", "tokenizer.words": "b", "vae.weights": "a"},
            ["tokenizer.words"],
        ),
    ],
)
def test_entries_that_differ_are_a_problem_or_accepted(stored, own, differ):
    compared = compare_fingerprints(stored, own)
    assert [difference.name for difference in compared.differences] == differ
    (problem,) = compared.problems("set")
    assert f"{differ[0]} is a in the data set and b here" in problem
    assert problem.endswith(f"if you know it to be harmless: {', '.join(differ)}")
    assert (HINT in problem) == (differ == [WHOLE_ENCODER])
    accepted = compare_fingerprints(stored, own, accept=differ)
    assert accepted.problems("set") == []
    assert [note for note in accepted.notes("set") if "accepted, though" in note]
