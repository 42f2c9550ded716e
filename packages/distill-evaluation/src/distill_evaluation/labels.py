"""The answers that a prompt asks for: attributes, and the words that name their classes.

`attributes` maps an attribute to its class words, in the order of the class indices:
`{"digit": ("zero", "one", ...), "direction": ("left", "right", "up", "down")}`. Needs no torch.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill_protocols import DataError
from distill_runtime import UnreadableFileError, read_bytes

Attributes = Mapping[str, Sequence[str]]


class PromptLabelError(DataError):
    """A prompt names no class of an attribute, or more than one."""

    def __init__(
        self, prompt: str, attribute: str, named: Sequence[str], words: Sequence[str]
    ) -> None:
        self.prompt = prompt
        self.attribute = attribute
        self.named = tuple(named)
        self.words = tuple(words)
        what = f"{len(named)} of them ({', '.join(named)})" if named else "none of them"
        super().__init__(
            f"prompt {prompt!r}, attribute {attribute!r}: exactly one of {', '.join(words)} must "
            "stand in the prompt as a whole word, "
            f"because the judge's answer is compared with it; it holds {what}. "
            "Reword the prompt, or report without a judge on prompts that it was not made for."
        )


def read_words(attribute: str, classes: object) -> tuple[str, ...]:
    """Take the class words of an attribute from a judge's settings.

    Raises:
        ValueError: they are no list of words.
    """
    if not isinstance(classes, list | tuple) or not all(isinstance(w, str) for w in classes):
        raise ValueError(f"{attribute!a}: {classes!a:.80} is no list of words")
    return tuple(classes)


def labels_of(prompt: str, attributes: Attributes) -> dict[str, int]:
    """Find the class index that `prompt` names, for every attribute.

    Case does not matter; "seventeen" is not "seven".

    Raises PromptLabelError if an attribute has no word, or two different ones, in the prompt.
    """
    words = set(re.findall(r"\w+", prompt.lower()))
    labels = {}
    for attribute, classes in attributes.items():
        named = [index for index, word in enumerate(classes) if word.lower() in words]
        if len(named) != 1:
            raise PromptLabelError(prompt, attribute, [classes[index] for index in named], classes)
        labels[attribute] = named[0]
    return labels


def label_prompts(prompts: Sequence[str], attributes: Attributes) -> dict[str, list[int]]:
    """Find the class indices of many prompts, one list per attribute. Errors as `labels_of`."""
    labels = [labels_of(prompt, attributes) for prompt in prompts]
    return {attribute: [each[attribute] for each in labels] for attribute in attributes}


def read_prompts(file: Path) -> list[str]:
    """Read one prompt per line; empty lines do not count. DataError if there is none to read."""
    try:
        lines = read_bytes(file).decode("utf-8").splitlines()
    except (UnreadableFileError, UnicodeDecodeError) as error:
        raise DataError(f"{file} must hold one prompt a line, in UTF-8: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{file} holds no prompt; put one on each line.")
    return prompts
