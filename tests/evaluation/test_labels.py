"""What a prompt asks the judge."""

import os

import pytest
from distill_evaluation import PromptLabelError, label_prompts, labels_of
from distill_evaluation.labels import read_prompts
from distill_protocols import DataError

ATTRIBUTES = {"digit": ("zero", "one", "seven"), "direction": ("left", "up")}


def test_classes_are_found_as_words_whatever_the_case() -> None:
    assert labels_of("The digit Seven, moving up!", ATTRIBUTES) == {"digit": 2, "direction": 1}


def test_a_class_inside_a_longer_word_does_not_count() -> None:
    assert labels_of("one of seventeen goes left, upwards never", ATTRIBUTES) == {
        "digit": 1,
        "direction": 0,
    }


def test_a_repeated_word_is_not_ambiguous() -> None:
    assert labels_of("zero zero left", ATTRIBUTES)["digit"] == 0


@pytest.mark.parametrize(
    ("prompt", "labels"), [("moving up", ()), ("a one and a seven moving up", ("one", "seven"))]
)
def test_none_or_two_is_an_error_that_shows_the_way_out(
    prompt: str, labels: tuple[str, ...]
) -> None:
    with pytest.raises(PromptLabelError) as excinfo:
        labels_of(prompt, ATTRIBUTES)
    assert (excinfo.value.prompt, excinfo.value.attribute, excinfo.value.named) == (
        prompt,
        "digit",
        labels,
    )
    for part in (repr(prompt), "zero, one, seven", "Reword the prompt"):
        assert part in str(excinfo.value)


def test_a_list_of_prompts_is_a_whole_text_file(tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("one up\n\n zero left \n")
    assert read_prompts(tmp_path / "prompts.txt") == ["one up", "zero left"]
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name in ("pipe", "bytes", "missing"):
        with pytest.raises(DataError, match=rf"{name} must hold one prompt a line, in UTF-8"):
            read_prompts(tmp_path / name)


def test_many_prompts_give_one_list_per_attribute() -> None:
    assert label_prompts(["one up", "zero left"], ATTRIBUTES) == {
        "digit": [1, 0],
        "direction": [1, 0],
    }
