"""Several ranks have one text encoder between them."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_jobs import encode
from ranks import run_on_ranks
from toy_data import embedding, write_dataset

PROMPTS = ["a", "b", "a"]


def cached(folder: Path) -> list[Path]:
    return list(folder.rglob("*.safetensors"))


def test_the_first_rank_encodes_for_all(tmp_path):
    data = write_dataset(tmp_path / "data", 3, negative=None)
    [first, second] = run_on_ranks(
        encode, tmp_path / "run", data, "ugly", "encoder-a", [PROMPTS] * 2
    )
    assert first["calls"] == ["ugly", "a", "b"]
    assert second["calls"] == []
    negative, prompts = second["conditions"]
    assert negative["text"] == (-embedding("ugly")).tolist()
    assert prompts["text"] == [embedding(prompt)[0].tolist() for prompt in PROMPTS]
    assert first["conditions"][:2] == second["conditions"]
    assert len(cached(tmp_path / "run")) == 3
    # Another number of ranks finds it there.
    for again in run_on_ranks(
        encode, tmp_path / "run", data, "ugly", "encoder-a", [PROMPTS], size=1
    ):
        assert again["calls"] == []
        assert again["conditions"] == first["conditions"]


def test_without_a_fingerprint_and_with_constants(tmp_path):
    data = write_dataset(tmp_path / "data", 3, negative="ugly")
    [first, second] = run_on_ranks(encode, tmp_path / "run", data, None, None, [PROMPTS] * 2)
    assert (first["calls"], second["calls"]) == (["a", "b"], [])
    assert first["conditions"][:2] == second["conditions"]
    assert not cached(tmp_path / "run")


@pytest.mark.parametrize(
    ("negative", "fingerprint", "word"),
    [(None, "encoder-a", "no negative condition"), ("", "encoder-b", "encoder-a.*encoder-b")],
    ids=["no negative", "another encoder"],
)
def test_a_failure_on_the_first_rank_fails_on_all(tmp_path, negative, fingerprint, word):
    data = write_dataset(tmp_path / "data", 3, negative=None)
    outcomes = run_on_ranks(encode, tmp_path / "run", data, negative, fingerprint, [PROMPTS] * 2)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].startswith("ConditioningError: rank 0: ")
    assert all(part in outcomes[0] for part in word.split(".*"))


def test_ranks_that_ask_for_different_prompts_are_refused(tmp_path):
    outcomes = run_on_ranks(encode, tmp_path, None, "", "encoder-a", [["a"], ["b"]])
    for own, text in zip("ab", outcomes, strict=True):
        assert text.startswith("ConditioningError: rank 1 and rank 0 ask for different things")
        assert f"conditions of ['{own}']" in text
        assert "on every rank" in text
    assert len(cached(tmp_path)) == 1  # the negative one, for which all asked
