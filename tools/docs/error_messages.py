"""The messages of all errors that the packages raise, read off the source."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from functools import cache

from distill_protocols import DistillError

from docs.options import message_text
from docs.sections import ROOT


@cache
def error_classes() -> Mapping[str, str]:
    """Return name -> docstring of each class of the error tree, in the order of its module."""
    from distill_protocols import errors

    return {
        name: inspect.cleandoc(value.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, DistillError) and value is not DistillError
    }


@cache
def all_messages() -> Mapping[str, tuple[tuple[str, str], ...]]:
    """Return class -> (message, module) of each ``raise`` of the tree, sorted by module.

    A message that consists of a value alone (another error's) is left out.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for file in sorted([*ROOT.glob("packages/*/src/**/*.py"), *ROOT.glob("apps/*/src/**/*.py")]):
        module = ".".join(file.relative_to(ROOT).parts[3:]).removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            call = node.exc
            if isinstance(call.func, ast.Name) and call.func.id in error_classes() and call.args:
                text = message_text(call.args[0])
                if sum(character.isalpha() for character in text) >= 12:
                    found.setdefault(call.func.id, []).append((text, module))
    return {name: tuple(dict.fromkeys(values)) for name, values in found.items()}
