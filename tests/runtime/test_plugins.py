"""Plugins are searched for once on a path, and what a new path adds is found."""

from __future__ import annotations

from importlib import metadata

import distill_runtime.plugins
from distill_runtime import load_plugin, plugin_names


def test_a_path_is_searched_once_for_each_group(tmp_path, monkeypatch):
    searches = []

    def search(*, group):
        searches.append(group)
        return real(group=group)

    real = metadata.entry_points
    monkeypatch.setattr(distill_runtime.plugins.metadata, "entry_points", search)
    info = tmp_path / "mine-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: mine\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[distill.methods]\nmine = mine:plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "mine" in plugin_names("distill.methods")
    assert load_plugin("distill.methods", "dmd2").name == "dmd2"
    assert plugin_names("distill.families")
    assert searches == ["distill.methods", "distill.families"]
    monkeypatch.undo()
    assert "mine" not in plugin_names("distill.methods")
