"""YAML as run files have it: 1.2, in which ``on`` and ``no`` are words."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML 1.2's booleans."""


class _Dumper(yaml.SafeDumper):
    """The same, for writing; multiples of 1,000,000 and small numbers as people write them."""


for _cls in (_Loader, _Dumper):
    _cls.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:bool"]
        for first, rules in _cls.yaml_implicit_resolvers.items()
    }
    _cls.add_implicit_resolver(
        "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF")
    )


def parse_yaml(text: str) -> Any:
    """Return the plain values of a file or block."""
    return yaml.load(text, _Loader)


def yaml_text(value: Any) -> str:
    """Write a value on one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6,
                     allow_unicode=True, sort_keys=False)  # fmt: skip
    return text.removesuffix("\n").removesuffix("\n...").strip()
