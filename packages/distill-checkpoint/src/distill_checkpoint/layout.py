"""Where everything is: checkpoints in an output folder, and files in a checkpoint. No torch here.

::

    checkpoint-000400/
      manifest.json                     sizes and checksums; written last
      config.json                       the resolved run file
      loop.json                         iteration, and which of everything below there is
      method.json                       update counts and loss scaler
      loader{/,.json}                   data position, by rank
      roles/<role>/<module>/            safetensors under the module's own names
      optimizers/<role>.<module>{/,.json}
      schedulers/<role>.<module>{/,.json}
      ema/<role>.<module>{/,.json}
      callbacks/<name>{/,.json}
      rng{/,.json}                      generator states, by rank

State that has a folder and a ``.json`` has its tensors in the one and the rest in the other
(``values.py``); state without tensors has no folder.

A checkpoint is written under a name that begins with a dot and renamed once it is whole, so that
whatever is called ``checkpoint-<iteration>`` was whole when it got that name.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from distill_runtime import DELETED_PREFIX, publish_folder

from distill_checkpoint.config import KeepBestConfig

logger = logging.getLogger(__name__)

ModuleKey = tuple[str, str]
"""(role, module)."""

MANIFEST = "manifest.json"
LOOP = "loop.json"
CONFIG = "config.json"

_STAGING = ".staging-"
"""Before the name of a checkpoint that is being written."""
_REPLACED = ".replaced-"
"""Before the name of a checkpoint that gives way to a new one of the same iteration."""
_NAME = re.compile(r"checkpoint-(\d{6,})")


# -- checkpoints in an output folder --------------------------------------------------------------


def folder_name(iteration: int) -> str:
    """``checkpoint-000400``."""
    return f"checkpoint-{iteration:06d}"


def checkpoints(output_dir: Path) -> dict[int, Path]:
    """List the folders with a checkpoint's name, whole or not, by iteration, the newest first."""
    if not output_dir.is_dir():
        return {}
    folders = {
        int(match[1]): path
        for path in output_dir.iterdir()
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    }
    return dict(sorted(folders.items(), reverse=True))


def new_staging_folder(target: Path) -> Path:
    """Make an empty folder beside ``target``, to be filled and then published."""
    staging = target.with_name(f"{_STAGING}{target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    return staging


def publish(staging: Path, target: Path) -> None:
    """Rename ``staging``, whose files are on the disk, to ``target``.

    A folder of that name (damaged, or of a run that was resumed from before it) gives way. When
    this returns, the new name is on the disk.
    """
    aside = target.with_name(f"{_REPLACED}{target.name}")
    publish_folder(staging, target, aside=aside, files_are_synced=True)


def clear_leftovers(output_dir: Path) -> None:
    """Remove what a killed process left under dot names."""
    if not output_dir.is_dir():
        return
    for path in sorted(output_dir.iterdir()):
        if path.name.startswith(_REPLACED):
            # Killed between the two renames of `publish`: the old one is still the newest.
            target = path.with_name(path.name.removeprefix(_REPLACED))
            if not target.exists():
                path.rename(target)
                continue
        if path.name.startswith((_STAGING, _REPLACED, DELETED_PREFIX)):
            logger.info("removed %s, left by a process that was killed", path)
            shutil.rmtree(path, ignore_errors=True)


def superseded(
    metrics: Mapping[int, Mapping[str, float]],
    *,
    keep_last: int,
    keep_every: int | None = None,
    keep_best: KeepBestConfig | None = None,
) -> tuple[int, ...]:
    """Choose which of the whole checkpoints to delete, the oldest first.

    The newest ``keep_last`` (at least 1) stay, multiples of ``keep_every``, and those that were
    best by a metric; of equals the newer.

    Args:
        metrics: by iteration, what was measured in it.
    """
    best: set[int] = set()
    if keep_best is not None:
        sign = 1 if keep_best.mode == "min" else -1
        measured = {i: m[keep_best.metric] for i, m in metrics.items() if keep_best.metric in m}
        best.update(sorted(measured, key=lambda i: (sign * measured[i], -i))[: keep_best.count])
    older = sorted(metrics)[:-keep_last]
    return tuple(i for i in older if (keep_every is None or i % keep_every) and i not in best)


# -- files in a checkpoint ------------------------------------------------------------------------


def as_file_name(name: str) -> str:
    """``name`` as one file name, different for different names: any string may name a role."""
    # A dot separates role from module, and ".." would leave the folder.
    return quote(name, safe=" ").replace(".", "%2E") or "%"


def role_folder(checkpoint: Path, role: str, module: str) -> Path:
    """The folder of one module's weights."""
    return checkpoint / "roles" / as_file_name(role) / as_file_name(module)


def state_path(checkpoint: Path, kind: str, *names: str) -> Path:
    """The path without suffix of one state of ``kind``: ``state_path(c, "ema", role, module)``."""
    return checkpoint / kind / ".".join(as_file_name(name) for name in names)


def json_of(state: Path) -> Path:
    """The JSON file of the state at ``state_path``."""
    return state.with_name(f"{state.name}.json")


def rank_key(rank: int) -> str:
    """The key of a rank's own states in ``loader`` and ``rng``."""
    return f"rank-{rank:05d}"
