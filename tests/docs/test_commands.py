"""What the pages tell a reader to type works: commands, run files, Python.

Every `uv run` line of every page must be taken by its parser. Those of the walks are run too, in
their order, on run files of a few steps; before a release they are run as they stand
(`uv run pytest -m slow`). A comment before a block says what is not run, and why.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from attrs import frozen
from distill_runfile.cli import EXIT_INCOMPLETE, EXIT_OK
from docs.markup import CodeBlock, code_blocks
from docs.options import read_options
from docs.render import app_names
from docs.sections import option_pages
from docs.yaml_text import parse_yaml
from workspace import ROOT

PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"),
     *ROOT.glob("packages/*/README.md"), *ROOT.glob("apps/*/README.md")]
)  # fmt: skip
OTHER_PROGRAMS = {"basedpyright", "hf", "pytest", "python", "ruff", "tensorboard", "uvicorn"}
FEW = (
    (r"max_train_steps: \d+", "max_train_steps: 2"),
    (r"every_steps: \d+", "every_steps: 2"),
    (r"global_batch_size: \d+", "global_batch_size: 4"),
    (r"clips_per_prompt: \d+", "clips_per_prompt: 2"),
    (r"start_update: \d+", "start_update: 0"),
    (r"generator_update_interval: \d+", "generator_update_interval: 2"),
    (
        r"steps: 32(?=.*\}\})",
        "steps: 4",
    ),  # of reports; trajectories are kept at times that it passes
    (r"limit: 1000", "limit: 4"),
    (r"batch_size: 50", "batch_size: 4"),
    (r"samples_per_shard: 100", "samples_per_shard: 4"),
)
"""What makes a run file of configs/tiny one of seconds."""


@frozen(kw_only=True)
class Command:
    """A line of a page.

    Attributes:
        words: without `uv run` and without comments.
        processes: of torchrun; 0: it is started without.
        note: the comment before its block.
    """

    words: tuple[str, ...]
    processes: int
    note: str


def note_before(text: str, block: CodeBlock) -> str:
    """Return the comment on the line before a block, without its signs."""
    line = text.splitlines()[block.line - 2 : block.line - 1]
    match = re.fullmatch(r"<!-- (.*) -->", line[0].strip()) if line else None
    return match[1] if match else ""


def commands(text: str) -> Iterator[Command]:
    """Yield the `uv run` lines of a page."""
    for block in code_blocks(text):
        if block.language not in ("", "sh", "bash", "text", "console"):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                found = re.match(r"^(?:\w+=\S+ )*uv run (.*)", part.strip())
                if found and "<" not in found[1]:
                    yield _command(shlex.split(found[1], comments=True), note_before(text, block))


def _command(words: list[str], note: str) -> Command:
    processes = 0
    if words[0] == "torchrun":
        assert words[1] == "--nproc-per-node", words
        processes, words = int(words[2]), words[3:]
    return Command(words=tuple(words), processes=processes, note=note)


def run_app(words: tuple[str, ...]) -> None:
    """Run one line in this process."""
    name = words[0].removeprefix("apps/")
    status = import_module(f"distill_{name}.cli").main(list(words[1:]))
    planned = EXIT_INCOMPLETE if "--dry-run" in words else EXIT_OK
    assert status in (EXIT_OK, planned), words


COMMANDS = [(page, command) for page in PAGES for command in commands(page.read_text())]


def test_commands_are_found():
    words = [command.words for _, command in COMMANDS]
    assert len(words) > 60
    assert {word[0].removeprefix("apps/") for word in words} >= set(app_names())


@pytest.mark.parametrize(
    ("page", "command"),
    COMMANDS,
    ids=[f"{page.relative_to(ROOT)}-{' '.join(c.words)[:60]}" for page, c in COMMANDS],
)
def test_a_parser_takes_every_command(page, command):
    program, *arguments = command.words
    if program in OTHER_PROGRAMS:
        return
    assert (ROOT / program).exists(), f"{page.name}: there is no {program}"
    if not program.startswith("apps/") or "--help" in arguments:
        return
    parser = import_module(f"distill_{program.removeprefix('apps/')}.cli")._parser()
    args = parser.parse_args(arguments)
    config = str(getattr(args, "config", None) or "")
    if config.startswith("configs/"):
        written = {b.text.split("\n")[0] for b in code_blocks(page.read_text())}
        assert (ROOT / config).is_file() or f"# {config}" in written


def unknown_keys(config: type, value: object, path: str) -> Iterator[str]:
    """Yield the keys of a section that nobody reads, nested ones included."""
    if not isinstance(value, dict):
        return
    options = {option.name: option for option in read_options(config)}
    for key, inner in value.items():
        if key not in options:
            yield f"{path}.{key}"
            continue
        option = options[key]
        for nested in option.nested[:1] if len(option.nested) == 1 else ():
            values = inner if isinstance(inner, list) else [inner]
            if option.is_by_name and isinstance(inner, dict):
                values = list(inner.values())
            for one in values:
                yield from unknown_keys(nested, one, f"{path}.{key}")


def unknown_in_file(content: dict[str, object]) -> Iterator[str]:
    """Yield the keys of a file, or of a part of one, that nobody reads."""
    recipe = content.get("recipe")
    names = set(recipe.values()) if isinstance(recipe, dict) else set()
    for name, value in content.items():
        sections = [
            section
            for page in option_pages()
            for section in page.sections
            if section.path.split(".")[0] == name
        ]
        chosen = [s for s in sections if not names or not s.plugin or s.plugin in names] or sections
        if not sections:
            yield name
        elif "." in sections[0].path and isinstance(value, dict):  # by role, or by callback
            parts = ((section.path.split("."), section) for section in sections)
            by_name = {path[1]: section for path, section in parts if len(path) == 2}
            for key, inner in value.items():
                section = by_name.get(key) or by_name.get("<role>")
                if section is None:
                    yield f"{name}.{key}"
                else:
                    yield from unknown_keys(section.config, inner, f"{name}.{key}")
        else:
            found = [list(unknown_keys(s.config, value, name)) for s in chosen]
            yield from min(found, key=len)


SECTIONS = {section.path.split(".")[0] for page in option_pages() for section in page.sections}
YAML = [
    (page, block)
    for page in PAGES
    for block in code_blocks(page.read_text())
    if block.language == "yaml"
]


@pytest.mark.parametrize(
    ("page", "block"), YAML, ids=[f"{p.relative_to(ROOT)}:{b.line}" for p, b in YAML]
)
def test_run_files_on_pages_hold_only_keys_that_exist(page, block):
    content = parse_yaml(block.text)
    if isinstance(content, dict) and set(content) & SECTIONS:
        foreign = {"time_limit", "mine", "pipeline_config_path"}  # of a guide, of no section
        unknown = [key for key in unknown_in_file(content) if not set(key.split(".")) & foreign]
        assert unknown == []


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A folder that looks like a clone. Run files are copies, as their paths begin beside them."""
    monkeypatch.chdir(tmp_path)
    for folder in (ROOT / "configs").iterdir():
        (tmp_path / "configs" / folder.name).mkdir(parents=True)
        for item in folder.iterdir():
            copy = tmp_path / "configs" / folder.name / item.name
            if item.suffix == ".yaml":
                copy.write_text(item.read_text())
            else:
                copy.symlink_to(item)
    return tmp_path


@pytest.fixture
def workplace(clone) -> Path:
    """A clone whose tiny run files take seconds."""
    for file in (clone / "configs" / "tiny").glob("*.yaml"):
        text = file.read_text()
        for pattern, few in FEW:
            text = re.sub(pattern, few, text)
        file.write_text(text)
    return clone


@pytest.fixture(autouse=True)
def keep_torch_as_it_was():
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


def walk(page: str, *, seen: list[str] | None = None) -> None:
    """Do what a page says, in its order, but for blocks whose note says that they are not run."""
    text = (ROOT / "docs" / page).read_text()
    for block in code_blocks(text):
        note = note_before(text, block)
        if note.startswith("not run"):
            continue
        if block.language == "yaml" and re.match(r"# \S+\.yaml\n", block.text):
            Path(block.text.split("\n")[0][2:]).write_text(block.text)
        elif block.language == "python" and note.startswith("python"):
            exec(compile(block.text, page, "exec"), {})
        elif block.language == "":
            for command in commands(f"```\n{block.text}```\n"):
                if command.words[0].startswith("apps/"):
                    run_app(command.words)
                    (seen if seen is not None else []).append(" ".join(command.words))


def test_the_first_run_and_what_follows(workplace):
    seen: list[str] = []
    walk("start/first-run.md", seen=seen)
    assert len(seen) == 4
    output = workplace / "outputs" / "tiny-dmd2"
    names = (
        "student/sampler_spec.json", "report.html", "report.json", "contact_sheet.png", "clips.mp4",
        "metrics.jsonl", "checkpoint-000002", "validation", "run_record.json",
    )  # fmt: skip
    assert [name for name in names if not (output / name).exists()] == []
    assert len(list((output / "samples").rglob("*.mp4"))) >= 3
    walk("guides/resume.md")
    walk("guides/export.md")
    assert (workplace / "student-comfy" / "student-comfy.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("page", ["guides/lora.md", "guides/causal.md", "methods/kd.md"])
def test_guides_are_walked(workplace, page):
    walk(page)


@pytest.mark.slow
def test_the_first_run_as_it_stands(clone):
    walk("start/first-run.md")
    report = json.loads((clone / "outputs" / "tiny-dmd2" / "report.json").read_text())
    (student,) = (entry for entry in report["entries"] if entry["name"] == "student_2")
    assert student["frechet_distance"] < 8  # as the page shows: 5.3


@pytest.mark.slow
def test_the_plan_of_the_real_run(workplace, capsys):
    walk("real-run.md")
    assert "fits: " in capsys.readouterr().out
    from distill_preprocess.request import read_request

    (workplace / "clips").mkdir()
    read_request(Path("configs/wan/data.yaml"))
