"""Plugins: found by name, searched for once on a path, refused with the reason."""

from __future__ import annotations

from importlib import metadata
from importlib.metadata import EntryPoint

import pytest
from distill_protocols import PluginError
from distill_runtime import load_plugin, plugin_names, plugins


def test_a_path_is_searched_once_for_each_group(tmp_path, monkeypatch):
    searches = []

    def search(*, group):
        searches.append(group)
        return real(group=group)

    real = metadata.entry_points
    monkeypatch.setattr(plugins.metadata, "entry_points", search)
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


def test_unknown_plugins_are_answered_with_the_known_ones():
    with pytest.raises(
        PluginError, match=r"unknown method 'dmd3'; did you mean 'dmd2'\? \(installed: .*dmd2, "
    ):
        load_plugin("distill.methods", "dmd3")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("x", "no_such_module:plugin")], "does not import: No module named 'no_such_module'"),
        ([("x", "math:pi")], "is a float, not an instance of MethodPlugin"),
        ([("x", "math:pi"), ("x", "math:e")], "is offered twice"),
    ],
)
def test_broken_plugins_are_refused_with_the_reason(monkeypatch, entries, message):
    group = "distill.methods"
    entry_points = [EntryPoint(name=n, value=v, group=group) for n, v in entries]
    monkeypatch.setattr(plugins, "entry_points", lambda group: entry_points)
    with pytest.raises(PluginError, match=message):
        load_plugin(group, "x")
