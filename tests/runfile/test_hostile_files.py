"""Run files that somebody wrote to do harm, or a program wrongly: an answer at once, with exit
status 2, a line for each problem, and nothing that a terminal would obey.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from distill_protocols import ConfigError
from distill_runfile import cli, read_config, read_source
from distill_train.cli import main

ALIASES = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 0}]" for i in range(10))
MERGES = "m0: &m0 {k: v}\n" + "\n".join(
    f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, 10)
)
SECONDS = 120
"""A hang lasts for hours; a busy machine takes some seconds."""


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """End a test that would not end."""

    def give_up(*_: object) -> None:
        pytest.fail("no answer")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def problems(*files: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as excinfo:
        read_config(*files)
    return excinfo.value.problems


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES, "holds more than 20000 values"),
        (MERGES, "holds more than 20000 values"),
        (f"{ALIASES}\n? *a9\n: 3", "holds more than 20000 values"),
        ("x: [" + "1, " * 50_000 + "1]", "holds more than 20000 values"),
        ("x: " + "[" * 200_000, "is nested too deeply to be read (more than 100 levels)"),
        ("x: " + "{a: " * 5000, "is nested too deeply"),
        ("- " * 5000, "is nested too deeply"),
        ("x: " + "y" * (1 << 20), "more than 1048576 are not read"),
    ],
    ids=["aliases", "merges", "alias as key", "many", "brackets", "braces", "dashes", "large"],
)
def test_a_file_that_would_never_be_read_is_a_problem(write, text, message):
    (problem,) = problems(write(text))
    assert message in problem


def test_aliases_and_merges_within_the_limits_are_what_they_say(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "a: &a {x: 1, y: [1, 2]}\nb: {<<: *a, x: 2}\nc: {<<: [{x: 3}, *a], z: 4}\nd: [*a, *a]\n"
    )
    source = read_source(file)
    assert source.problems == []
    a = {"x": 1, "y": [1, 2]}
    assert source.values == {
        "a": a, "b": {**a, "x": 2}, "c": {**a, "x": 3, "z": 4}, "d": [a, a],
    }  # fmt: skip
    assert source.values == yaml.safe_load(file.read_text())
    assert source.line(("c", "y")) == 1
    assert source.line(("b", "x")) == 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", "!!int abc", "training.seed: cannot be read as int: 'abc' is no integer"),
        ("progress", "!!bool maybe", "training.progress: cannot be read as bool: 'maybe' is neit"),
        ("seed", "9" * 6000, "cannot be read as int: an integer of 6000 digits; at most 40"),
        ("seed", "9" * 4000, "cannot be read as int: an integer of 4000 digits; at most 40"),
        ("seed", "1e999", "cannot be read as float: the number 1e999 is larger than a float"),
        ("seed", "!!seq abc", "the tag 'tag:yaml.org,2002:seq' is not read here"),
        ("seed", "!!int [a]", "the tag 'tag:yaml.org,2002:int' is not read here"),
        ("seed", "!!timestamp 2001-01-01", "the tag 'tag:yaml.org,2002:timestamp'"),
        ("output_dir", '"a\\0b"', "holds a NUL character"),
        ("output_dir", '"\\ud800"', "holds half of a UTF-16 pair"),
        ("output_dir", "/" + "a" * 300, "training.output_dir: '/aaaaaaaa"),
        ("output_dir", "~nobody77/x", "there is no such user"),
        ("output_dir", "&a [*a]", "stands inside the very thing that it names"),
    ],
)  # fmt: skip
def test_an_odd_value_is_one_problem_with_its_line(values, write, key, value, message):
    values["training"].pop(key, None)
    text = write(values).read_text().replace("training:\n", f"training:\n  {key}: {value}\n", 1)
    line = text.splitlines().index("training:") + 2
    reported = problems(write(text))
    assert [p for p in reported if p.startswith(f"run.yaml:{line}: ") and message in p], reported
    assert len(reported) == 1 or key == "output_dir", reported
    assert not [p for p in reported if "None" in p]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("? [a, b]\n", "a key must be a word"),
        ("? {a: b}\n", "a key must be a word"),
        ('"\\ud800"', r"cannot be read as key: '\ud800' holds half of a UTF-16 pair"),
        ('"a\\0"', "cannot be read as key: 'a\\x00' holds a NUL"),
        ("!!binary aaa=", "the tag 'tag:yaml.org,2002:binary' is not read here"),
        ('"\\e[31mred\\e[0m"', r"\x1b[31mred\x1b[0m: unknown key"),
        ('"a\\nrun.yaml:1: forged"', r"a\nrun.yaml:1: forged: unknown key"),
        ('"\\u202ecba"', r"\u202ecba: unknown key"),
    ],
)
def test_an_odd_key_is_one_printable_problem(values, write, key, message):
    text = write(values).read_text() + f"{key}: 3\n"
    (problem,) = problems(write(text))
    assert message in problem
    assert problem.startswith(f"run.yaml:{text.count(chr(10)) - key.count(chr(10))}: ")
    assert problem.isprintable()


@pytest.mark.parametrize("value", ['"\\e[2J\\r"', '"\\u202e"', '!!x "\\e[2J"'])
def test_text_of_a_file_is_escaped_on_the_terminal(values, write, capsys, value):
    text = write(values).read_text().replace("recipe:", f'"\\e[31m": {value}\nrecipe:', 1)
    file = write(text + f"\nconditioning: {value}\n")
    assert main(["--config", str(file)]) == cli.EXIT_USAGE
    output = "".join(capsys.readouterr())
    assert r"\x1b[31m" in output
    assert "\n" in output
    assert output.replace("\n", "").isprintable()


def test_errors_and_logs_are_escaped_too(capsys):
    from distill_protocols import WeightsError

    def fail() -> int:
        raise WeightsError("a\x1b[2J of a weight file\nand more")

    assert cli.run_command(fail, interrupted=str) == cli.EXIT_FAILED
    cli.say("caf\xe9 \N{FOX FACE} \x07")
    output = capsys.readouterr()
    assert output.err == "WeightsError: a\\x1b[2J of a weight file\nand more\n"
    assert output.out == "caf\xe9 \N{FOX FACE} \\x07\n"


# -- JSON laid over -------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", ["\t", " \t", 2, None])
def test_models_json_is_json_whatever_its_indentation(values, write, tmp_path, indent):
    over = tmp_path / "models.json"
    over.write_text(json.dumps({"critic": {"precision": "bf16"}}, indent=indent))
    assert read_config(write(values), over).roles["critic"].spec.precision == "bf16"


def test_escaped_surrogate_pairs_of_models_json_are_text(values, write, tmp_path):
    over = tmp_path / "models.json"
    over.write_text('{"critic": {"pa\\ud83e\\udd8ath": 3}}')
    (problem,) = problems(write(values), over)
    assert "critic.pa\N{FOX FACE}th: unknown key" in problem
    problem.encode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"critic": {"optimizer": {"lr": ' + "9" * 4000 + "}}}", "an integer of 4000 digits"),
        ('{"critic": {"optimizer": {"lr": 1e999}}}', "larger than a float"),
        ('{"critic": {"path": "/a\\u0000b"}}', "holds a NUL character"),
        ('{"a":' * 150 + "1" + "}" * 150, "is nested too deeply"),
        ('{"a": [' + "0," * 30_000 + "0]}", "holds more than 20000 values"),
    ],
)
def test_hostile_models_json_is_one_problem(values, write, tmp_path, text, message):
    over = tmp_path / "models.json"
    over.write_text(text)
    (problem,) = problems(write(values), over)
    assert problem.startswith("models.json:1: ")
    assert message in problem
