"""What is on the site, and where in the repository it comes from."""

from __future__ import annotations

import logging
import posixpath
import re
import tomllib
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from attrs import frozen

from docs.markup import rewrite_links
from docs.render import (
    app_names,
    has_api,
    render_api,
    render_command_lines,
    render_errors,
    render_options,
    render_options_index,
    render_run_file,
    render_run_files_index,
    run_files,
)
from docs.sections import ROOT, option_pages

_log = logging.getLogger("mkdocs.docs")  # of mkdocs, which counts its warnings

API = "reference/api"
OPTIONS = "reference/options"
RUN_FILES = "reference/run-files"
REFERENCE = "docs/reference/README.md"
"""Where links to pages that only the site has lead in the repository; see ``Site._generated``."""
GENERATED = ("@options", "@api", "@run-files", "@packages", "@apps")
"""Entries of the navigation in mkdocs.yml that stand for generated pages."""


@frozen(kw_only=True)
class SitePage:
    """One page.

    Attributes:
        shows: the file or folder of the repository that it shows.
        source: the file that its links are relative to; empty: they are those of the site.
        text: its markdown; None: it is in docs/, where mkdocs reads it.
        title: its name in the navigation.
    """

    text: str | None
    shows: str = ""
    source: str = ""
    title: str = ""


@frozen(kw_only=True)
class Site:
    """All pages, by their path on the site, and the way there from files of the repository."""

    pages: Mapping[str, SitePage]
    by_source: Mapping[str, str]

    @classmethod
    def read(cls) -> Site:
        """Make every generated page, and find all others."""
        pages: dict[str, SitePage] = {}
        for file in sorted((ROOT / "docs").rglob("*.md")):
            uri = file.relative_to(ROOT / "docs").as_posix()
            pages[uri] = SitePage(source=f"docs/{uri}", shows=f"docs/{uri}", text=None)
        pages |= _repository_pages() | _generated_pages()
        by_source = {page.shows: uri for uri, page in pages.items() if page.shows}
        by_source["README.md"] = "index.md"  # which says the same
        return cls(pages=pages, by_source=by_source)

    def rewrite(self, markdown: str, uri: str) -> str:
        """Return the markdown of a page with its links as they are on the site; warn of a link
        to a file that is neither there nor in the repository."""
        source = self.pages[uri].source
        if not source:
            return markdown
        return rewrite_links(markdown, lambda target: self._target(target, source, uri))

    def _target(self, target: str, source: str, uri: str) -> str | None:
        if re.match(r"\w+:|#", target):
            return target
        path, sharp, fragment = target.partition("#")
        found = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if found == REFERENCE and fragment:
            return posixpath.relpath(self._generated(fragment), posixpath.dirname(uri) or ".")
        here = ROOT / found
        for candidate in (found, f"{found}/README.md"):
            if candidate in self.by_source:
                to = self.by_source[candidate]
                return posixpath.relpath(to, posixpath.dirname(uri) or ".") + sharp + fragment
        if found.startswith("docs/"):
            if not here.exists() and found.removeprefix("docs/") not in self.pages:
                _log.warning("%s links to %s, and there is no such file", source, target)
            return posixpath.relpath(found.removeprefix("docs/"), posixpath.dirname(uri) or ".")
        if not here.exists():
            _log.warning("%s links to %s, and there is no such file", source, target)
        return None

    def _generated(self, name: str) -> str:
        """Return the generated page, and the place in it, that ``name`` stands for: a page of the
        reference, a section of the run file, or a key of one. In the repository, which has no such
        pages, the link leads to the page that says how they are made."""
        section, dot, _ = name.partition(".")
        place = f"#{name}" if dot else ""
        for page in (
            f"{OPTIONS}/{section}.md",
            f"reference/{name}.md",
            f"reference/{name}/index.md",
        ):
            if page in self.pages:
                return page + place
        _log.warning("%s#%s: there is no page of that name", REFERENCE, name)
        return REFERENCE.removeprefix("docs/")

    def extend_nav(self, nav: list[Any]) -> list[Any]:
        """Replace each entry of ``GENERATED`` by the pages that it stands for."""
        return [entry for item in nav for entry in self._entries(item)]

    def _entries(self, item: Any) -> list[Any]:
        if item in GENERATED:
            folder = {
                "@options": OPTIONS,
                "@api": API,
                "@run-files": RUN_FILES,
                "@packages": "packages",
                "@apps": "apps",
            }[item]
            return [
                {page.title: uri}
                for uri, page in self.pages.items()
                if uri.startswith(f"{folder}/") and page.title
            ]
        if isinstance(item, dict):
            return [
                {
                    key: self.extend_nav(value) if isinstance(value, list) else value
                    for key, value in item.items()
                }
            ]
        return [item]


def _repository_pages() -> dict[str, SitePage]:
    """Documents that stand outside of docs/, as they are."""
    pages = {}
    apps = {f"distill-{name}" for name in app_names()}
    for kind in ("packages", "apps"):
        for member in sorted(ROOT.glob(f"{kind}/*/README.md")):
            name = tomllib.loads((member.parent / "pyproject.toml").read_text())["project"]["name"]
            folder = "apps" if name in apps else "packages"
            pages[f"{folder}/{name}.md"] = _document(member.relative_to(ROOT).as_posix(), name)
    for uri, source, title in (
        ("concepts/architecture.md", "ARCHITECTURE.md", "Architecture and glossary"),
        ("contributing.md", "CONTRIBUTING.md", "Contributing"),
        ("extend/example-sd3.md", "examples/family-sd3/README.md", "A complete family"),
    ):
        pages[uri] = _document(source, title)
    return pages


def _document(source: str, title: str) -> SitePage:
    return SitePage(source=source, shows=source, text=(ROOT / source).read_text(), title=title)


def _generated_pages() -> dict[str, SitePage]:
    pages = {f"{OPTIONS}/index.md": SitePage(text=render_options_index(), title="All keys")}
    for page in option_pages():
        pages[f"{OPTIONS}/{page.name}.md"] = SitePage(text=render_options(page), title=page.title)
    pages["reference/command-lines.md"] = SitePage(
        text=render_command_lines(), title="Command lines"
    )
    pages["reference/errors.md"] = SitePage(text=render_errors(), title="Error messages")
    for member in sorted([*ROOT.glob("packages/*/"), *ROOT.glob("apps/*/")]):
        if has_api(member):
            name = tomllib.loads((member / "pyproject.toml").read_text())["project"]["name"]
            pages[f"{API}/{name}.md"] = SitePage(text=render_api(member), title=name)
    pages[f"{RUN_FILES}/index.md"] = SitePage(
        shows="configs", text=render_run_files_index(), title="All run files"
    )
    for file in run_files():
        name = PurePosixPath(file.relative_to(ROOT / "configs").as_posix())
        pages[f"{RUN_FILES}/{name.with_suffix('.md')}"] = SitePage(
            shows=file.relative_to(ROOT).as_posix(), text=render_run_file(file), title=str(name)
        )
    return pages
