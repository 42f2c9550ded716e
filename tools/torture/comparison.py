"""What a run left behind, to be compared with what another one left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_checkpoint import list_checkpoints
from distill_checkpoint.manifest import inspect


def inspect_all(out: Path) -> int:
    """Hold every checkpoint against its manifest, byte for byte; returns how many there are."""
    checkpoints = list_checkpoints(out)
    for path in checkpoints.values():
        damage = inspect(path, checksums=True).damage
        assert damage is None, f"{path}: {damage}"
    return len(checkpoints)


def checkpoint_contents(checkpoint: Path) -> dict[str, Any]:
    """Every file by name: safetensors as their tensors (their header's order is free), JSON as it
    is; not the run file, which names the output folder."""
    from safetensors.numpy import load_file

    files: dict[str, Any] = {}
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if path.suffix == ".safetensors":
            files[name] = {k: v.tobytes() for k, v in load_file(path).items()}
        elif path.is_file() and name not in ("manifest.json", "config.json"):
            files[name] = json.loads(path.read_text())
    return files


def run_contents(out: Path) -> dict[str, Any]:
    """The last checkpoint, the names of the others, and all that a run writes beside them, without
    what is of the clock or names the folder."""
    checkpoints = list_checkpoints(out)
    files: dict[str, Any] = {"checkpoints": sorted(p.name for p in checkpoints.values())}
    newest = max(checkpoints)
    files |= {f"last/{k}": v for k, v in checkpoint_contents(checkpoints[newest]).items()}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if not path.is_file() or name.startswith((".", "checkpoint-", "tensorboard")):
            continue
        if name == "metrics.jsonl":
            files[name] = [_without_clock(json.loads(line)) for line in path.open()]
        elif name == "report.json":
            files[name] = _without_clock(json.loads(path.read_text()))
        elif name == "run_record.json":
            record = json.loads(path.read_text().replace(str(out), "<out>"))
            # How often a run was started, and when, is what its kills change; each has a run file
            # of its own name.
            files[name] = {k: record[k] for k in ("settings", "environment")}
        elif name == "report.html":
            # A page of the files that are compared here, with their times.
            files[name] = "is there"
        elif name != "run.json" and path.suffix != ".yaml":
            files[name] = path.read_bytes().replace(str(out).encode(), b"<out>")
    return files


def folder_contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def differing(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Names of what differs, or is in one alone; of lists with what is in one alone."""
    different = []
    for name in sorted(left.keys() | right):
        one, other = left.get(name), right.get(name)
        if one == other:
            continue
        if isinstance(one, list) and isinstance(other, list):
            name += f" (without {[x for x in one if x not in other]}"[:1000]
            name += f", with {[x for x in other if x not in one]})"[:1000]
        different.append(name)
    return different


def _without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: _without_clock(v)
            for k, v in value.items()
            # The text of a report has a column of seconds.
            if not k.startswith("time") and "second" not in k and k != "report"
        }
    return [_without_clock(v) for v in value] if isinstance(value, list) else value
