"""The option reference is made of the config classes, and says something about every key."""

from __future__ import annotations

import re

import pytest
import yaml
from attrs import Factory, field, frozen
from attrs.validators import optional
from distill_protocols.validators import at_least
from distill_runfile.structure import Structuring, structure
from docs.options import Option, read_options
from docs.render import anchor, render_options, render_options_index
from docs.sections import EXAMPLES, OptionsPage, Section, all_configs, example_of, option_pages
from docs.yaml_text import parse_yaml

CONFIGS = sorted(all_configs(), key=lambda config: config.__name__)
OF_THE_VALUE = re.compile(r"but must (be|have)|must be (one of|at least|above|within)|unknown key")
"""Messages about a value itself, and not about keys that are not written beside it."""


@frozen(kw_only=True)
class InnerConfig:
    """One part.

    Attributes:
        depth: of it.
    """

    depth: int


@frozen(kw_only=True)
class OuterConfig:
    """A section.

    More of it.

    Attributes:
        many: parts, by
            name.
        low, high: its bounds; None: no ``bound`` at all.
        pair: two numbers.
    """

    many: dict[str, InnerConfig]
    low: int = field(default=2, validator=at_least(1, "it counts"))
    high: float | None = field(default=None, validator=optional(at_least(0, "or none")))
    pair: tuple[int, int] = field(default=Factory(lambda: (1, 2)))

    @pair.validator
    def _check_pair(self, attribute: object, value: tuple[int, int]) -> None:
        if value[0] > value[1]:
            raise ValueError(f"{value[0]} is above {value[1]}: "
                             "write the smaller one first")  # fmt: skip


def test_a_key_is_described_by_its_class():
    many, low, high, pair = read_options(OuterConfig)
    assert many == Option(
        name="many", kind="mapping of names to mapping", default=None, text="parts, by name.",
        rules=(), nested=(InnerConfig,), is_by_name=True,
    )  # fmt: skip
    assert (low.kind, low.default) == ("whole number", "2")
    assert low.rules == ("must be at least 1: it counts",)
    assert (high.kind, high.default) == ("number or null", "null")
    assert high.text == "its bounds; null: no `bound` at all."
    assert high.rules == ("must be at least 0: or none",)
    assert (pair.kind, pair.default) == ("list of 2: whole number, whole number", "[1, 2]")
    assert pair.rules == ("… is above …: write the smaller one first",)


def test_a_key_that_nobody_describes_is_named():
    @frozen(kw_only=True)
    class BareConfig:
        """A section.

        Attributes:
            one: described.
        """

        one: int = 1
        other: int = 2

    with pytest.raises(ValueError, match=r"BareConfig\.other is in no Attributes"):
        read_options(BareConfig)


def test_a_page_has_every_key_below_its_section():
    page = OptionsPage(
        name="outer", title="outer", sections=(Section(path="outer", config=OuterConfig),)
    )
    text = render_options(page)
    for key in ("outer", "outer.many", "outer.low", "outer.pair", "outer.many.name.depth"):
        assert f"{{ #{key} " in text or f"{{ #{key} }}" in text, key
    assert "A section.\n\nMore of it." in text
    assert "**required** · [its keys](#outer.many.name)" in text


def test_the_keys_of_every_section_are_there():
    index = render_options_index()
    for page in option_pages():
        for section in page.sections:
            for option in read_options(section.config):
                key = anchor(f"{section.path}.{option.name}")
                assert f"[{option.name}]({page.name}.md#{key})" in index
    paths = [section.path for page in option_pages() for section in page.sections]
    assert paths.count("method_config") >= 9
    assert {"models.<role>", "checkpoint", "validation", "preprocess", "callbacks.ema"} < {*paths}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_key_has_an_example_that_it_takes(config):
    for option in read_options(config):
        example = example_of(config, option)
        assert example is not None  # tests/test_documents.py states what to do
        problems: list[str] = []
        how = Structuring(
            report=lambda path, message, name=option.name, found=problems: (
                found.append(message) if path[:1] == (name,) else None
            )
        )
        structure(config, {option.name: parse_yaml(example.text)}, (), how)
        wrong = [text for text in problems if OF_THE_VALUE.search(text)]
        assert wrong == [], f"{config.__name__}.{option.name}: {example.text}"


def test_written_examples_are_of_keys_that_exist():
    keys = {
        f"{cls.__name__}.{option.name}"
        for config in CONFIGS
        for option in read_options(config)
        for cls in config.__mro__
    }
    assert set(yaml.safe_load(EXAMPLES.read_text())) <= keys
