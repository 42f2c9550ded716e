"""Which sections there are, found as the run file finds them: by owner and by entry point."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from attrs import field, frozen
from distill_checkpoint import CheckpointConfig
from distill_conditioning.config import ConditioningConfig, DataConfig
from distill_preprocess.config import PreprocessConfig
from distill_protocols import SamplerSpec
from distill_runfile.schema import RecipeConfig, RoleConfig
from distill_runtime import load_plugin, plugin_names
from distill_trainer.config import TrainingConfig, ValidationConfig
from distill_trajectories.config import TrajectoriesConfig

from docs.markup import code_blocks
from docs.options import Option, read_options, read_owner
from docs.yaml_text import parse_yaml, yaml_text

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = Path(__file__).with_name("examples.yaml")


@frozen(kw_only=True)
class Section:
    """One section of a file.

    Attributes:
        path: of its keys, such as ``training`` or ``models.<role>``.
        config: the class that reads it.
        note: a sentence to begin with.
        plugin: the family or method that has it, where each has its own.
    """

    path: str
    config: type
    note: str = ""
    plugin: str = ""


@frozen(kw_only=True)
class OptionsPage:
    """One page of the option reference.

    Attributes:
        name: of the page's file, without its ending.
        title: heading.
        sections: what is on it, nested sections aside.
    """

    name: str
    title: str
    sections: tuple[Section, ...] = field()


@cache
def option_pages() -> tuple[OptionsPage, ...]:
    """List every section of every file that this project reads, plugins included."""
    families = {name: load_plugin("distill.families", name) for name in _names("families")}
    methods = {name: load_plugin("distill.methods", name) for name in _names("methods")}
    callbacks = {name: load_plugin("distill.callbacks", name) for name in _names("callbacks")}
    metrics = {name: load_plugin("distill.metrics", name) for name in _names("metrics")}
    return (
        OptionsPage(
            name="models",
            title="recipe and models",
            sections=(
                Section(path="recipe", config=RecipeConfig),
                Section(path="models.<role>", config=RoleConfig),
            ),
        ),
        _page("training", TrainingConfig),
        OptionsPage(
            name="data",
            title="data and conditioning",
            sections=(
                Section(path="data", config=DataConfig),
                Section(path="conditioning", config=ConditioningConfig),
            ),
        ),
        *(
            OptionsPage(
                name=f"pipeline_config-{name}",
                title=f"pipeline_config of {name}",
                sections=(
                    Section(
                        path="pipeline_config",
                        config=plugin.config_class,
                        plugin=name,
                        note="Beside these keys, `pipeline_config_path` may name a file that holds "
                        "them; keys here override those of the file "
                        "([several files](../../packages/distill-runfile.md#several-files)).",
                    ),
                ),
            )
            for name, plugin in families.items()
        ),
        *(
            OptionsPage(
                name=f"method_config-{name}",
                title=f"method_config of {name}",
                sections=(
                    Section(
                        path="method_config",
                        config=plugin.config_class,
                        note=_method_note(name),
                        plugin=name,
                    ),
                ),
            )
            for name, plugin in methods.items()
        ),
        OptionsPage(
            name="sampler",
            title="samplers",
            sections=(
                Section(
                    path="sampler",
                    config=SamplerSpec,
                    note="`student_sampler` of a method, and `sampler` of a validation view or of "
                    "an entry of a report, have these keys.",
                ),
            ),
        ),
        _page("checkpoint", CheckpointConfig),
        _page("validation", ValidationConfig),
        OptionsPage(
            name="callbacks",
            title="callbacks",
            sections=tuple(
                Section(
                    path=f"callbacks.{name}",
                    config=plugin.config_class,
                    note=f"{plugin.help[0].upper()}{plugin.help[1:]}.",
                )
                for name, plugin in callbacks.items()
            )
            + tuple(
                Section(
                    path=f"callbacks.report.metrics.{name}",
                    config=plugin.config_class,
                    note=f"{plugin.help[0].upper()}{plugin.help[1:]}.",
                )
                for name, plugin in metrics.items()
                if read_options(plugin.config_class)
            ),
        ),
        _page("preprocess", PreprocessConfig, "A section of the file of `apps/preprocess`."),
        _page("trajectories", TrajectoriesConfig, "A section of the file of `apps/trajectories`."),
    )


def _page(path: str, config: type, note: str = "") -> OptionsPage:
    section = Section(path=path, config=config, note=note)
    return OptionsPage(name=path, title=path, sections=(section,))


def _names(group: str) -> tuple[str, ...]:
    # Plugins that are installed beside those of this repository are theirs to document.
    texts = [file.read_text() for file in ROOT.glob("packages/*/pyproject.toml")]
    return tuple(
        name
        for name in plugin_names(f"distill.{group}")  # type: ignore[arg-type]
        if any(f'\n{name} = "distill_' in text for text in texts)
    )


def _method_note(name: str) -> str:
    page = ROOT / "docs" / "methods" / f"{name}.md"
    return f"The method, and values in use: [{name}](../../methods/{name}.md)." * page.exists()


def all_configs() -> Iterator[type]:
    """Yield each config class of the pages once."""
    seen: set[type] = set()
    pending = [section.config for page in option_pages() for section in page.sections]
    while pending:
        config = pending.pop()
        if config not in seen:
            seen.add(config)
            yield config
            pending += [nested for option in read_options(config) for nested in option.nested]


@frozen
class Example:
    """A value that some file gives an option.

    Attributes:
        text: the value, as YAML.
        source: the run file, relative to the root; None: made for the reference.
    """

    text: str
    source: str | None = None


@cache
def examples() -> Mapping[tuple[type, str], Example]:
    """Collect a value for each option, by the class that declares it and its name: of the shipped
    run files, of the guides, or of ``examples.yaml``."""
    found: dict[tuple[type, str], Example] = {}
    for name, content in _files():
        recipe = content.get("recipe")
        for page in option_pages():
            for section in page.sections:
                if not _belongs(section, recipe if isinstance(recipe, dict) else {}):
                    continue
                for value in _values(content, section.path.split(".")):
                    _collect(section.config, value, name, found)
    written = parse_yaml(EXAMPLES.read_text()) or {}
    classes = {cls.__name__: cls for config in all_configs() for cls in config.__mro__}
    for path, value in written.items():
        # A class that no section uses any more is a KeyError here.
        owner, _, key = path.partition(".")
        found.setdefault((classes[owner], key), Example(yaml_text(value)))
    return found


def _belongs(section: Section, recipe: Mapping[str, Any]) -> bool:
    """Return whether a section that families or methods have each of their own is this file's."""
    return not section.plugin or section.plugin in (recipe.get("family"), recipe.get("method"))


def _files() -> Iterator[tuple[str | None, dict[str, Any]]]:
    files = (ROOT / "configs").glob("*/*.yaml")
    for file in sorted(files, key=lambda f: (f.parent.name != "wan", f)):
        yield f"configs/{file.parent.name}/{file.name}", parse_yaml(file.read_text())
    for page in (*sorted((ROOT / "docs").rglob("*.md")), *ROOT.glob("packages/*/README.md")):
        for block in code_blocks(page.read_text()):
            if block.language == "yaml":
                content = parse_yaml(block.text)
                if isinstance(content, dict):
                    yield None, content


def _values(content: Any, path: list[str]) -> Iterator[Any]:
    if not path:
        yield content
    elif isinstance(content, dict):
        name, *rest = path
        for value in content.values() if name == "<role>" else [content.get(name)]:
            yield from _values(value, rest)


def _collect(
    config: type, value: Any, source: str | None, found: dict[tuple[type, str], Example]
) -> None:
    if not isinstance(value, dict):
        return
    for option in read_options(config):
        if option.name in value:
            given = value[option.name]
            key = (read_owner(config, option.name), option.name)
            if key not in found and given is not None and len(yaml_text(given)) <= 100:
                found[key] = Example(yaml_text(given), source)
            for nested in option.nested:
                # A mapping or a list of sections, or one section.
                inner = given if isinstance(given, list) else [given]
                if isinstance(given, dict) and option.is_by_name:
                    inner = list(given.values())
                for one in inner:
                    _collect(nested, one, source, found)


def example_of(config: type, option: Option) -> Example | None:
    """Return a value of an option that somebody uses."""
    return examples().get((read_owner(config, option.name), option.name))
