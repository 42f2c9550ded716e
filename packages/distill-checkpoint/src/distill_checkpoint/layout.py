"""Where things are in a checkpoint folder.

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

Where a thing has a folder and a ``.json``, tensors are in the one and the rest in the other
(``values.py``); a thing without tensors has no folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote

Part = tuple[str, str]
"""(role, module)."""

STAGING = ".staging-"
REPLACED = ".replaced-"
DELETED = ".deleted-"
_NAME = re.compile(r"checkpoint-(\d{6,})")


def folder_name(iteration: int) -> str:
    return f"checkpoint-{iteration:06d}"


def checkpoints(output_dir: Path) -> dict[int, Path]:
    """Folders with a checkpoint's name, whole or not, by iteration, the newest first."""
    if not output_dir.is_dir():
        return {}
    found = {
        int(match[1]): path
        for path in output_dir.iterdir()
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    }
    return dict(sorted(found.items(), reverse=True))


def safe(name: str) -> str:
    """``name`` as one file name, different for different names: any string may name a role."""
    # A dot separates role from module, and ".." would leave the folder.
    return quote(name, safe=" ").replace(".", "%2E") or "%"


def role_folder(checkpoint: Path, role: str, module: str) -> Path:
    return checkpoint / "roles" / safe(role) / safe(module)


def part_path(checkpoint: Path, kind: str, *names: str) -> Path:
    """Path without suffix of one thing of ``kind``: ``part_path(c, "ema", role, module)``."""
    return checkpoint / kind / ".".join(safe(name) for name in names)


def rank_key(rank: int) -> str:
    """Under which a rank's own states are."""
    return f"rank-{rank:05d}"
