"""Plugins, found through entry points. No torch here."""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Mapping
from importlib import metadata
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

from distill_protocols import (
    CONTRACT_VERSION,
    CallbackPlugin,
    FamilyPlugin,
    Group,
    MethodPlugin,
    MetricPlugin,
    PluginError,
    TrackerPlugin,
)

_KINDS: Mapping[Group, tuple[str, type]] = {
    "distill.families": ("family", FamilyPlugin),
    "distill.methods": ("method", MethodPlugin),
    "distill.callbacks": ("callback", CallbackPlugin),
    "distill.trackers": ("tracker", TrackerPlugin),
    "distill.metrics": ("metric", MetricPlugin),
}
GROUPS: tuple[Group, ...] = tuple(_KINDS)


def entry_points(*, group: Group) -> EntryPoints:
    """Return what is installed in ``group``, searched for once for all callers on a path.

    A search reads a file of every installed distribution, and a run file names twenty plugins.
    """
    return _search(tuple(sys.path), group)


@functools.cache
def _search(path: tuple[str, ...], group: Group) -> EntryPoints:
    return metadata.entry_points(group=group)


def plugin_names(group: Group) -> tuple[str, ...]:
    """Return names of everything installed in ``group``, sorted."""
    return tuple(sorted({entry.name for entry in entry_points(group=group)}))


def load_plugin(group: Group, name: str) -> Any:
    """Return the plugin called ``name``.

    Raises:
        PluginError: none of that name (with the known ones and the nearest), it does not import,
            it is not a plugin of this kind, or it was built for another contract.
    """
    kind, base = _KINDS[group]
    entries = [entry for entry in entry_points(group=group) if entry.name == name]
    if not entries:
        known = plugin_names(group)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PluginError(
            f"unknown {kind} {name!r}{hint} (installed: {', '.join(known) or 'none'})"
        )
    targets = sorted({entry.value for entry in entries})
    if len(targets) > 1:
        raise PluginError(
            f"{kind} {name!r} is offered twice, by {' and '.join(targets)}; a name must mean one "
            "thing. Uninstall one of the packages."
        )
    plugin = _import(entries[0], kind)
    if not isinstance(plugin, base):
        raise PluginError(
            f"{kind} {name!r} ({targets[0]}) is a {type(plugin).__name__}, not an instance of "
            f"{base.__name__}; the entry point must name one."
        )
    # Contract 1 had no such attribute.
    stated = getattr(plugin, "contract", 1)
    if stated != CONTRACT_VERSION:
        raise PluginError(
            f"{kind} {name!r} ({targets[0]}) was built for contract {stated} of distill-protocols, "
            f"and this is contract {CONTRACT_VERSION}; its calls would fail or mean something "
            "else. Install a version of it for this contract."
        )
    return plugin


def _import(entry: EntryPoint, kind: str) -> Any:
    try:
        return entry.load()
    # SystemExit: a module may be written as a script, or look for a licence.
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PluginError(
            f"{kind} {entry.name!r} ({entry.value}) does not import: {reason}. The package that "
            "offers it is installed but broken; reinstall it."
        ) from error
