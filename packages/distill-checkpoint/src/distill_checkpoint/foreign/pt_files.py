"""``.pt`` files: tensors and plain containers, or a refusal. A pickle is a program, and is not run.

``torch.load(weights_only=True)`` interprets the pickle with a machine of its own that knows tensors
and containers and nothing to call. What is said here is why, and what to do instead.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from distill_protocols import CheckpointError
from torch import Tensor

_NAMED = re.compile(r"(?:GLOBAL|global:?) (?:GLOBAL )?([\w.]+)")


def load_pt(file: Path) -> Any:
    """What ``file`` holds, its tensors mapped from the disk rather than read.

    Raises:
        CheckpointError: it is missing, no such file, or would call something when unpickled.
    """
    try:
        # A file of before torch 1.6 is no zip, and only a zip can be mapped.
        return torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror or error}); name a file that is there and "
            "that this user may read"
        ) from error
    except Exception as error:  # a damaged pickle raises from anywhere
        raise _refusal(str(file), error) from error


def load_bytes(content: bytes, where: str) -> Any:
    """As ``load_pt``, of a ``.pt`` file that is part of another file.

    Raises:
        CheckpointError: it is no such file, or would call something when unpickled.
    """
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise _refusal(where, error) from error


def tensors_of(value: Any, where: str) -> Mapping[str, Tensor]:
    """``value``, if it is a mapping of names to plain tensors.

    Raises:
        CheckpointError: it is something else.
    """
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"{where} is a {type(value).__name__}, where a state dict (name -> tensor) must be; "
            "save it again as torch.save({'generator': model.state_dict()}, ...)"
        )
    other = [str(name) for name, item in value.items() if type(item) is not Tensor]
    if other:
        raise CheckpointError(
            f"{where}: {', '.join(other[:5])}{' ...' if len(other) > 5 else ''} is no plain tensor "
            "on its own, and only such have a place among weights. Save the state dict alone"
        )
    return value


def would_run(where: str, called: str) -> CheckpointError:
    """The refusal of a pickle that names something to call."""
    return CheckpointError(
        f"{where} was not read: to unpickle it, {called} would have to be imported and called, and "
        "a pickle that calls what it likes can run any program on this machine; only tensors and "
        "plain containers are taken. If you know where it comes from, load it there and save "
        "nothing but the weights: torch.save({'generator': state_dict}, ...)"
    )


def _refusal(where: str, error: Exception) -> CheckpointError:
    said = str(error)
    if "weights_only" in said.lower() or "weights only" in said.lower():
        named = _NAMED.search(said)
        if named:
            return would_run(where, named[1])
    lines = [line for line in said.splitlines() if line.strip()]
    first = lines[0].strip() if lines else "no reason given"
    return CheckpointError(
        f"{where} holds no weights that can be read ({type(error).__name__}: {first[:200]}): it "
        "was cut short, is a Git LFS pointer, or was not written by torch.save with tensors and "
        "plain containers alone. Copy or download it again"
    )
