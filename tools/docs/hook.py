"""What mkdocs calls: adds the generated pages, and leads links of the repository to the site."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

TOOLS = str(Path(__file__).resolve().parents[1])
if TOOLS not in sys.path:
    sys.path.insert(0, TOOLS)

from docs.pages import Site  # noqa: E402

_SITE = Site.read()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages into the navigation."""
    assert config.nav is not None
    config.nav = _SITE.extend_nav(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for uri, page in _SITE.pages.items():
        if page.text is not None:
            files.append(File.generated(config, uri, content=page.text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links that are right in the repository to where they are right on the site."""
    return _SITE.rewrite(markdown, page.file.src_uri)
