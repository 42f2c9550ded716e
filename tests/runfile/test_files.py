"""Several files as one run file: JSON that is read as JSON, and pipeline_config_path."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from distill_protocols import ConfigError
from distill_runfile import read_config, read_source

FOX = "\N{FOX FACE}"


def problems(*args: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as excinfo:
        read_config(*args)
    return excinfo.value.problems


# -- JSON -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 2, "\t"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_json_is_read_as_json_reads_it(tmp_path, indent, ascii_only):
    value = {
        "models": {"a": {"path": f"./{FOX}", "lora": {"rank": 2, "alpha": 1e-3}, "fsdp": None}},
        "list": [1, -2.5, True, False, None, "x\ty\\\"z", [], {}, [{"deep": [0]}]],
    }  # fmt: skip
    file = tmp_path / "models.json"
    file.write_text(json.dumps(value, indent=indent, ensure_ascii=ascii_only))
    source = read_source(file)
    assert source.problems == []
    assert source.values == value
    expected = 1 if indent is None else 5
    assert source.lines[("models", "a", "lora")] == expected


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('{"a": 1,\n "b": }', 2, "not valid JSON: Expecting value"),
        ('{"a": 1,\n}', 2, "not valid JSON: Expecting a key in double quotes"),
        ('{"a": [1 2]}', 1, "not valid JSON: Expecting ','"),
        ('{"a": 1}\n{', 2, "not valid JSON: Extra data"),
        ('{"a":\n NaN}', 2, "not valid JSON: NaN is no JSON number"),
        ('{"a":\n "\\ud800"}', 2, "holds half of a UTF-16 pair"),
        ('{"a": 1,\n "a": 2}', 2, "written twice (first in line 1)"),
        ("[" * 200_000, 1, "is nested too deeply"),
        ("[1]", 1, "the file is a sequence"),
        ("", 1, "not valid JSON: Expecting value"),
    ],
)
def test_problems_of_json_have_a_line(tmp_path, text, line, message):
    file = tmp_path / "models.json"
    file.write_text(text)
    (problem,) = read_source(file).problems
    assert message in str(problem)
    assert problem.line == line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!int abc", "cannot be read as int"),
        ("a: !!bool maybe", "cannot be read as bool"),
        ("a: " + "9" * 6000, "cannot be read as int"),
        ('a: "\\ud800"', "holds half of a UTF-16 pair"),
        ('"\\ud800": 1', "holds half of a UTF-16 pair"),
        ("\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 0}]" for i in range(9)),
         "holds more than"),
    ],
)  # fmt: skip
def test_hostile_yaml_is_answered(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    source = read_source(file)
    assert any(message in str(problem) for problem in source.problems)
    assert all(str(problem).encode() for problem in source.problems)  # a terminal can show it


def test_escaped_surrogate_pairs_are_one_character_in_yaml_too(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text('a: "\\ud83e\\udd8a"')
    assert read_source(file).values == {"a": FOX}


def test_models_json_may_be_indented_with_tabs(values, write, tmp_path):
    overlay = tmp_path / "models.json"
    overlay.write_text(json.dumps({"critic": {"precision": "bf16"}}, indent="\t"))
    assert read_config(write(values), overlay).roles["critic"].spec.precision == "bf16"
    overlay.write_text(json.dumps({"critic": {"precision": FOX}}, indent="\t"))
    (problem,) = problems(write(values), overlay)
    assert problem.startswith("models.json:3: critic.precision: ")


# -- pipeline_config_path -------------------------------------------------------------------------


def with_pipeline(values: dict[str, Any], path: str, **beside: Any) -> dict[str, Any]:
    return values | {"pipeline_config": {"pipeline_config_path": path, **beside}}


def test_pipeline_config_may_be_in_a_file_of_its_own(values, write, tmp_path):
    expected = read_config(write(values)).pipeline
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "wan.json").write_text(json.dumps(values["pipeline_config"], indent="\t"))
    lines = [f"{key}: {value}" for key, value in values["pipeline_config"].items()]
    (folder / "wan.yaml").write_text("\n".join(lines))
    for name in ("wan.json", "wan.yaml"):
        config = read_config(write(with_pipeline(values, f"./configs/{name}")))
        assert config.pipeline == expected
        assert "pipeline_config_path" not in config.resolved["pipeline_config"]


def test_keys_beside_file_override_those_of_the_file(values, write, tmp_path):
    file = tmp_path / "wan.json"
    file.write_text(json.dumps(values["pipeline_config"] | {"num_frames": 13}))
    (problem,) = problems(write(with_pipeline(values, "wan.json")))
    assert "data.path: " in problem  # of 9 frames
    assert read_config(write(with_pipeline(values, "wan.json", num_frames=9))).roles


def test_problems_name_the_file_that_holds_the_key(values, write, tmp_path):
    pipeline = values["pipeline_config"] | {"num_frames": 8, "hieght": 3}
    (tmp_path / "wan.json").write_text(json.dumps(pipeline, indent=1))
    reported = problems(write(with_pipeline(values, "wan.json", width="wide")))
    place = {problem.split(": ")[1]: problem.split(": ")[0] for problem in reported}
    keys = list(pipeline)
    assert place.pop("num_frames") == f"wan.json:{keys.index('num_frames') + 2}"
    assert place.pop("hieght") == f"wan.json:{keys.index('hieght') + 2}"
    assert place.pop("pipeline_config.width").startswith("run.yaml:")
    assert place == {}


def test_folders_in_it_are_taken_from_its_own_place(values, write, tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    model = values["models"]["student"]["path"]
    pipeline = values["pipeline_config"] | {"components": os.path.relpath(model, folder)}
    (folder / "wan.json").write_text(json.dumps(pipeline))
    assert (
        read_config(write(with_pipeline(values, "configs/wan.json"))).pipeline.components == model
    )


@pytest.mark.parametrize(
    ("path", "content", "start", "message"),
    [
        ("gone.json", None, "run.yaml:", "there is no file"),
        (7, None, "run.yaml:", "7 must be the path of a YAML or JSON file"),
        ("wan.json", "[]", "wan.json:1:", "pipeline_config_path takes a YAML or JSON file"),
        ("wan.json", "{\n", "wan.json:2:", "not valid JSON"),
        ("wan.yaml", "a: [", "wan.yaml:1:", "not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_read(values, write, tmp_path, path, content, start, message):
    if content is not None:
        (tmp_path / path).write_text(content)
    (problem,) = problems(write(with_pipeline(values, path)))
    assert problem.startswith(start)
    assert message in problem


def test_pipeline_config_path_belongs_under_pipeline_config(values, write):
    (problem,) = problems(write({**values, "pipeline_config_path": "./wan.json"}))
    assert "pipeline_config_path: is no section of its own: write it under" in problem
    assert "pipeline_config: {pipeline_config_path: FILE}" in problem


def test_the_whole_run_file_may_be_json(values, tmp_path):
    file = Path(tmp_path / "run.json")
    file.write_text(json.dumps(values, indent=2))
    assert list(read_config(file).roles) == ["student", "teacher", "critic"]
