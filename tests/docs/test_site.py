"""The site builds without a warning, leads nowhere that is not there, and loads nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from docs.markup import code_blocks, rewrite_links
from docs.pages import Site
from workspace import ROOT, read_members

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src"}


class _Page(HTMLParser):
    """What a page links to, loads and can be linked at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := found.get(key))}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"] or "")
        if tag == "link" and found.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.loads.append(found.get("href") or "")
        if tag in LOADED and found.get(LOADED[tag]):
            self.loads.append(found[LOADED[tag]] or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, str(ROOT / "tools" / "docs"), "build", "--to", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, _Page]:
    return {file: _Page(file.read_text()) for file in sorted(site.rglob("*.html"))}


def test_every_link_leads_to_something(site, pages):
    broken = []
    for file, page in pages.items():
        for link in page.links:
            target, fragment = urldefrag(link)
            if urlsplit(link).scheme or (file.name == "404.html" and target.startswith("/")):
                continue
            there = (file.parent / unquote(target)).resolve() if target else file
            is_page = there in pages
            if not there.is_file() or (
                fragment and is_page and unquote(fragment) not in pages[there].anchors
            ):
                broken.append(f"{file.relative_to(site)} -> {link}")
    assert broken == []


def test_nothing_is_loaded_from_elsewhere(site, pages):
    loads = {(file, load) for file, page in pages.items() for load in page.loads}
    assert len(loads) > len(pages)
    assert [str(item) for item in loads if urlsplit(item[1]).scheme not in ("", "data")] == []
    absent = [
        f"{file.name}: {load}"
        for file, load in loads
        if file.name != "404.html"
        and urlsplit(load).scheme != "data"
        and not (file.parent / unquote(load.partition("?")[0])).is_file()
    ]
    assert absent == []
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:|@import", style.read_text()), style.name


def test_what_is_generated_is_there(site):
    text = {
        name: (site / "reference" / name).read_text()
        for name in ("command-lines.html", "errors.html", "options/checkpoint.html")
    }
    for member in read_members().values():
        if member.folder.parent.name == "apps":
            assert f"usage: apps/{member.folder.name}" in text["command-lines.html"]
    assert "is no checkpoint (which has a manifest.json)" in text["errors.html"]
    assert 'id="checkpoint.keep_best.metric"' in text["options/checkpoint.html"]
    api = (site / "reference" / "api" / "distill-protocols.html").read_text()
    assert 'id="distill_protocols.DistillAdapter' in api
    index = (site / "search" / "search_index.js").read_text()
    assert "generator_update_interval" in index


def test_links_follow_what_is_on_the_site():
    site = Site.read()
    text = (
        "[a](../packages/distill-trainer/README.md#trackers) [b](../packages/distill-trainer) "
        "[c](../configs/wan/dmd2_1.3b.yaml) [d](../tools/launch) [e](https://example.org) "
        "[f](methods/dmd2.md) [g][g] [h][x]\n```\n[i](../nowhere)\n```\n"
        "[j](reference/README.md#errors) [k](reference/README.md#models.role.lora) "
        "[l](reference/README.md)\n"
        "[g]: ../ARCHITECTURE.md\n[x]: ../tools/golden\n"
    )
    assert site.rewrite(text, "data.md") == (
        "[a](packages/distill-trainer.md#trackers) [b](packages/distill-trainer.md) "
        "[c](reference/run-files/wan/dmd2_1.3b.md) d [e](https://example.org) "
        "[f](methods/dmd2.md) [g][g] h\n```\n[i](../nowhere)\n```\n"
        "[j](reference/errors.md) [k](reference/options/models.md#models.role.lora) "
        "[l](reference/README.md)\n"
        "[g]: concepts/architecture.md\n\n"
    )


def test_a_link_to_nothing_is_a_warning(caplog):
    links = "[a](../nowhere.md) [b](nowhere.md) [c](reference/README.md#nowhere)"
    Site.read().rewrite(links, "data.md")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3


def test_blocks_and_links_of_markdown():
    text = "# Top\n\n```yaml run\na: 1\n```\n\n## Next\n\n- item\n\n  ```\n  b\n  ```\n"
    first, second = code_blocks(text)
    assert (first.language, first.words, first.text) == ("yaml", ("run",), "a: 1\n")
    assert (first.heading, second.heading, second.line) == ("Top", "Next", 11)
    assert rewrite_links("[`x`](y) `[x](y)`", lambda _: "z") == "[`x`](z) `[x](y)`"
