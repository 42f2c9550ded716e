"""The generated pages, as markdown."""

from __future__ import annotations

import contextlib
import io
import os
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from distill_runtime import load_plugin, plugin_names
from distill_runtime.plugins import GROUPS

from docs.error_messages import all_messages, error_classes
from docs.options import Option, read_options, summary
from docs.sections import ROOT, OptionsPage, Section, example_of, option_pages

HELP_COLUMNS = "96"
APPS = ("train", "preprocess", "trajectories", "sample", "export", "migrate", "report")


def title_of(text: str) -> str:
    """Return a heading of a page, with the sections of files as code."""
    return f"# {text}\n\n"


def render_options(page: OptionsPage) -> str:
    """Write one page of the option reference."""
    parts = [title_of(f"Options: {page.title}")]
    documented: set[type] = set()
    for section in page.sections:
        parts += _render_section(section.path, section.config, section.note, documented)
    return "\n".join(parts)


def _render_section(path: str, config: type, note: str, documented: set[type]) -> Iterator[str]:
    documented.add(config)
    options = read_options(config)
    yield f"## `{path}` {{ #{anchor(path)} }}\n"
    yield "\n\n".join(filter(None, (note, summary(config)))) + "\n"
    if not options:
        return
    nested: list[tuple[str, type]] = []
    for option in options:
        yield from _render_option(path, config, option, nested, documented)
    for inner_path, inner in nested:
        if inner not in documented:
            yield from _render_section(inner_path, inner, "", documented)


def _render_option(
    path: str, config: type, option: Option, nested: list[tuple[str, type]], documented: set[type]
) -> Iterator[str]:
    yield f"### `{option.name}` {{ #{anchor(f'{path}.{option.name}')} .option }}\n"
    default = "**required**" if option.default is None else f"default `{option.default}`"
    kind = f"{option.kind} · {default}"
    for one in option.nested:
        inner = f"{path}.{option.name}" + (".&lt;name&gt;" if option.is_by_name else "")
        page = SHARED.get(one.__name__)
        target = f"#{anchor(_plain(inner))}"
        if page is not None and not path.startswith("sampler"):
            target = f"sampler.md#{page}"
        elif one in documented or any(one is other for _, other in nested):
            target = f"#{anchor(_plain(next((p for p, c in nested if c is one), path)))}"
        else:
            nested.append((_plain(inner), one))
        kind += f" · [its keys]({target})"
    yield f"{kind}\n{{: .kind }}\n"
    yield f"{_sentence(option.text)}\n"
    if example := example_of(config, option):
        where = ""
        if example.source is not None:
            name = example.source.removeprefix("configs/").removesuffix(".yaml")
            where = f" in [{name}](../run-files/{name}.md)"
        yield f"Example: `{option.name}: {example.text}`{where}\n"
    if option.rules:
        yield "Refused with:\n"
        yield from (f"- {escape(rule)}" for rule in option.rules)
        yield ""


SHARED = {"SamplerSpec": "sampler", "DynamicShift": "sampler.shift"}
"""Classes that have a page of their own, and their anchors there."""


def _plain(path: str) -> str:
    return path.replace("&lt;", "<").replace("&gt;", ">")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}" if text[:1].isalpha() and " " in text else text


def anchor(path: str) -> str:
    """Return the anchor of a key: its path."""
    return path.replace("<", "").replace(">", "").replace("`", "")


def escape(text: str) -> str:
    """Keep what stands in a message from being markup."""
    for sign in ("\\", "`", "*", "_", "<", "[", "{", "#", "|"):
        text = text.replace(sign, f"\\{sign}" if sign != "<" else "&lt;")
    return text


def render_options_index() -> str:
    """Write the page that lists all options: page, section, key."""
    parts = [
        title_of("Options"),
        "Every key that a run file, a file of `apps/preprocess` or of `apps/trajectories` may "
        "have. The pages are made of the config classes that read these keys: text, type, default "
        "and rules are those of the code. A key that is not here is refused, with its line.\n",
        "| section | keys |",
        "|---|---|",
    ]
    for page in option_pages():
        for section in page.sections:
            keys = ", ".join(
                f"[{o.name}]({page.name}.md#{anchor(f'{section.path}.{o.name}')})"
                for o in read_options(section.config)
            )
            parts.append(f"| [{_cell(section)}]({page.name}.md) | {keys or 'none'} |")
    return "\n".join(parts) + "\n"


def _cell(section: Section) -> str:
    name = section.path.replace("<", "&lt;").replace(">", "&gt;")
    return f"{name} of {section.plugin}" if section.plugin else name


def app_names() -> tuple[str, ...]:
    """Name the apps that are here, in the order of a newcomer's walk."""
    there = {folder.parent.name for folder in ROOT.glob("apps/*/pyproject.toml")}
    return (*(name for name in APPS if name in there), *sorted(there - set(APPS)))


def help_of(app: str) -> str:
    """Return what ``uv run apps/<app> --help`` prints."""
    main = import_module(f"distill_{app}.cli").main
    text, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = HELP_COLUMNS
    try:
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            main(["--help"])
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    return text.getvalue()


def render_command_lines() -> str:
    """Write what the parsers of all apps know."""
    parts = [
        title_of("Command lines"),
        "In the workspace an app is started by `uv run apps/<name>`; where its wheel is "
        "installed, by `distill-<name>`. Exit statuses are the same everywhere: 0 done, 1 failed, "
        "2 the file or the request is wrong, 3 a plan for which something is not here yet, 74 the "
        "disk, 75 stopped with everything saved, 130 interrupted.\n",
    ]
    for app in app_names():
        readme = f"[What it does](../apps/distill-{app}.md)."
        parts.append(f"## apps/{app} {{ #{app} }}\n\n{readme}\n\n```text\n{help_of(app)}```\n")
    parts.append("## What is installed { #plugins }\n\n`uv run apps/train --plugins`\n")
    for group in GROUPS:
        rows = [f"| `{name}` | {load_plugin(group, name).help} |" for name in plugin_names(group)]
        title = group.removeprefix("distill.")
        parts.append("\n".join([f"| {title} | |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


def render_errors() -> str:
    """Write the page of all messages, by the class of the error."""
    parts = [
        title_of("Error messages"),
        "A message states the value that was found, the rule that it breaks, the reason, and the "
        "way out. What stands for a value is an ellipsis here; search for the words around it. "
        "Messages about one key of a run file are beside that key in the "
        "[option reference](options/index.md), and come with the file and the line.\n",
    ]
    messages = all_messages()
    for name, text in error_classes().items():
        found = messages.get(name, ())
        parts.append(f"## {name}\n\n{escape(text)}\n")
        parts += [f"- {escape(message)} *({module})*" for message, module in found]
        parts.append("")
    return "\n".join(parts)


def render_run_file(file: Path) -> str:
    """Write the page of one shipped run file."""
    name = file.relative_to(ROOT).as_posix()
    return f"# {name.removeprefix('configs/')}\n\n`{name}`\n\n```yaml\n{file.read_text()}```\n"


def run_files() -> tuple[Path, ...]:
    """List the shipped run files."""
    files = (ROOT / "configs").glob("*/*.yaml")
    return tuple(sorted(files, key=lambda f: (f.parent.name != "tiny", f)))


def render_run_files_index() -> str:
    """Write the list of the shipped run files, with the first lines of each."""
    parts = [
        title_of("Shipped run files"),
        "Those of `configs/tiny` run on a CPU, offline; all others are for published models, with "
        "a source for each number.\n",
        "| file | what |",
        "|---|---|",
    ]
    for file in run_files():
        name = file.relative_to(ROOT / "configs").as_posix()
        comment = []
        for line in file.read_text().splitlines():
            if not line.startswith("# "):
                break
            comment.append(line[2:])
        text = " ".join(comment).split(". ")[0].replace("|", "\\|")
        parts.append(f"| [{name}]({name.removesuffix('.yaml')}.md) | {text} |")
    return "\n".join(parts) + "\n"


def render_api(member: Path) -> str:
    """Write the API page of one package, which mkdocstrings fills."""
    project = tomllib.loads((member / "pyproject.toml").read_text())["project"]
    module = project["name"].replace("-", "_")
    return f"# {project['name']}\n\n::: {module}\n"


def has_api(member: Path) -> bool:
    """Return whether a member of the workspace exports names."""
    return any("__all__" in f.read_text() for f in member.glob("src/*/__init__.py"))
