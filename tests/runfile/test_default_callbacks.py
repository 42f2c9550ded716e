"""Callbacks that a run has although its file does not name them."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint

import distill_runtime.plugins
import pytest
from attrs import frozen
from distill_protocols import Callback, CallbackPlugin, ConfigError
from distill_runfile import cli, describe
from distill_runfile.read import read_config


@frozen(kw_only=True)
class WatchConfig:
    every: int = 5


class WatchPlugin(CallbackPlugin[WatchConfig]):
    name = "watch"
    contract = 2
    help = "watches a run"
    config_class = WatchConfig
    on_by_default = True

    def build(self, config, parts) -> Callback:
        raise NotImplementedError


class AskedForPlugin(WatchPlugin):
    name = "asked_for"
    on_by_default = False


watch, asked_for = WatchPlugin(), AskedForPlugin()


@pytest.fixture
def offer(monkeypatch):
    """Offer callbacks of this module beside the installed ones, but those on by default."""
    real = distill_runtime.plugins.entry_points

    def offer(**targets: str) -> None:
        def entry_points(*, group: str):
            if group != "distill.callbacks":
                return real(group=group)
            others = [e for e in real(group=group) if not e.load().on_by_default]
            return (*others, *(EntryPoint(n, t, group) for n, t in targets.items()))

        monkeypatch.setattr(distill_runtime.plugins, "entry_points", entry_points)

    return offer


@pytest.fixture
def both(offer):
    offer(watch=f"{__name__}:watch", asked_for=f"{__name__}:asked_for")


@pytest.mark.usefixtures("both")
def test_a_run_has_it_with_its_defaults_and_says_so(values, write, capsys):
    config = read_config(write(values))
    assert list(config.callbacks)[-1] == "watch"
    assert "asked_for" not in config.callbacks
    assert config.callbacks["watch"] == WatchConfig()
    assert config.resolved["callbacks"]["watch"] == {"every": 5}
    assert "watches a run (on by default; callbacks: {watch: null} turns it off)" in describe(
        config
    )
    cli.list_plugins()
    listed = capsys.readouterr().out.splitlines()
    assert any(line.endswith("watches a run (on by default)") for line in listed)
    assert any("asked_for" in line and line.endswith("watches a run") for line in listed)


@pytest.mark.usefixtures("both")
def test_null_turns_it_off_and_the_record_keeps_that(values, write):
    values["callbacks"] |= {"watch": None, "asked_for": None}
    # Averages of the critic are kept by nobody, and a callback that is off must not hide that.
    values["checkpoint"]["export"] = [{"role": "critic", "folder": "e", "ema": True}]
    with pytest.raises(ConfigError, match="no average of 'critic' is kept"):
        read_config(write(values))
    del values["checkpoint"]["export"]
    config = read_config(write(values))
    assert "watch" not in config.callbacks
    assert config.callbacks["asked_for"] == WatchConfig()
    assert config.callbacks_off == ("watch",)
    text = describe(config)
    assert "  watch        off" in text.splitlines()
    again = read_config(write(json.dumps(config.resolved), "resolved.json"))
    assert again.resolved == config.resolved


@pytest.mark.usefixtures("both")
def test_options_of_it_are_read_as_of_any_other(values, write):
    values["callbacks"]["watch"] = {"every": 7}
    assert read_config(write(values)).callbacks["watch"] == WatchConfig(every=7)
    values["callbacks"]["watch"] = {"evry": 7}
    with pytest.raises(ConfigError, match=r"callbacks\.watch\.evry: unknown key; did you mean"):
        read_config(write(values))


def test_one_that_is_not_installed_or_broken_is_nothing(values, write, offer):
    offer()
    config = read_config(write(values))
    assert config.notes == ()
    assert "watch" not in config.callbacks
    offer(watch="no_such_module:watch")
    config = read_config(write(values))
    assert "watch" not in config.callbacks
    (note,) = config.notes
    assert "callback watch is left out" in note
    assert "No module named 'no_such_module'" in note


def test_health_of_a_role_that_is_not_there_is_a_problem(values, write):
    values["callbacks"]["health"] = {"role": "studnet"}
    with pytest.raises(ConfigError, match=r"callbacks\.health\.role: there is no role 'studnet'"):
        read_config(write(values))
